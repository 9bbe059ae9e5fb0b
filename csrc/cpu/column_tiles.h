// How the per-sample norms share out work among threads: the columns of each sample in tiles.
#pragma once

#include <cstdint>

#include "core/macros.h"

namespace fastsel::cpu {

// The widest tile: its sums, in double, take a quarter of a first-level cache of 32 KB.
constexpr int64_t kWidestTile = 1024;

// Tile i is the columns [i % tiles * width, ...) of sample i / tiles.
struct ColumnTiles {
  int64_t width, tiles;
  double* squares;  // [B, tiles], what a tile adds to its sample's squared norm
};

// A tile's columns, decided by the shape alone, so that results are the same at any thread count: as
// many as may be, but where there are few samples, few enough to give several threads something.
FASTSEL_HD int64_t tile_width(int64_t batch, int64_t positions, int64_t columns,
                              int64_t narrowest) {
  constexpr int64_t kEnoughTiles = 16, kLittleWork = 65536;
  int64_t width = columns < 1 ? 1 : columns < kWidestTile ? columns : kWidestTile;
  while (width / 2 >= narrowest && batch * ((columns + width - 1) / width) < kEnoughTiles &&
         positions * width > kLittleWork) {
    width = (width + 1) / 2;
  }
  return width;
}

// Tiles that a thread should have at least: below some 16,384 elements handing out the work costs
// more than it saves.
FASTSEL_HD int64_t tiles_per_thread(int64_t positions, int64_t width) {
  return 16384 / (positions * width + 1) + 1;
}

}  // namespace fastsel::cpu
