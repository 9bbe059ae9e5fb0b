// Runs the tiles of a per-sample norm on torch's threads and adds them up.
#pragma once

#include <vector>

#include "core/grad_norm_arguments.h"
#include "cpu/column_tiles.h"
#include "torch_api.h"

namespace fastsel::cpu {

// A tile narrower than this would read a position's row in pieces shorter than two cache lines.
constexpr int64_t kNarrowestTile = 64;

// norms[b] = the sum of what run(tiles, begin, end) leaves for the tiles of sample b; `narrowest` is
// the least number of columns worth a tile.
template <class Arguments, class Norm, class Run>
void sum_tiles(const Arguments& a, int64_t narrowest, Norm* norms /* [B] */, Run&& run) {
  const int64_t width = tile_width(a.batch, a.positions, a.columns, narrowest);
  const int64_t tiles = (a.columns + width - 1) / width;
  std::vector<double> squares(static_cast<size_t>(a.batch * tiles));
  const ColumnTiles t{width, tiles, squares.data()};
  torch::stable::parallel_for(0, a.batch * tiles, tiles_per_thread(a.positions, width),
                              [&](int64_t begin, int64_t end) { run(t, begin, end); });
  for (int64_t sample = 0; sample < a.batch; ++sample) {
    double norm = 0;
    for (int64_t i = 0; i < tiles; ++i) norm += squares[sample * tiles + i];
    norms[sample] = static_cast<Norm>(norm);
  }
}

}  // namespace fastsel::cpu
