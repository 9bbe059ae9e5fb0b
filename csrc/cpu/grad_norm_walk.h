// How the CPU walks through samples, channels and positions for the per-sample norms of linear
// layers and convolutions.
//
// A layer is given by a source of operands, one copy a thread:
//
//   const LayerShape& shape() const
//   int64_t chunks() const             blocks of positions, whose products add up
//   NormOperand operand(sample, group, first_column, columns, chunk)    valid until the next call
//   int64_t pack(sample, group, first_channel, channels, chunk, width, packed, column_sums)
//                                      G of a chunk; returns its positions
//   void transpose_a(sample, group, width, out)    A^T as [panel][d][width], zeros beyond T
//   void transpose_g(sample, group, width, out)    G^T, likewise
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/grad_norm_simd.h"
#include "cpu/isa.h"
#include "grad_norm.h"

namespace fastsel::cpu {

struct LayerShape {
  int64_t batch;      // B
  int64_t groups;     // independent layers side by side
  int64_t positions;  // T
  int64_t columns;    // d of a group
  int64_t channels;   // p of a group
};

// What a walk computes beside the norms. Null where it is not wanted.
struct WeightGrads {
  float* weight = nullptr;  // [groups * p, d], summed over samples
  float* bias = nullptr;    // [groups * p]
};

struct NormResult {
  std::vector<double> weight;  // [B]
  std::vector<double> bias;    // [B]
};

// A block of the product A^T G is worked on at a time, for one sample after the other: its sums over
// samples, 256 KB, stay in the second-level cache, with a chunk of positions of A and of packed G.
constexpr int64_t kNormBlock = 65536;       // elements of the product
constexpr int64_t kNormBlockPanels = 4;     // panels of channels, at most
constexpr int64_t kNormBlockColumns = 768;  // columns, at most
constexpr int64_t kNormChunk = 256;         // positions
// Work is cut into about this many items by the shape alone, so that no result depends on the number
// of threads. Each group of samples sums a weight gradient of its own; together they take at most
// this many bytes, or one copy.
constexpr int64_t kNormItems = 64;
constexpr int64_t kNormCopiesBytes = 4 << 20;
// Multiplications worth handing to another thread.
constexpr double kNormGrain = 500'000;
// A Gram sum whose terms together exceed it by this factor has lost the digits that float32 had to
// spare, and is computed directly.
constexpr double kGramCancellation = 16;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t padded_width(int64_t count) { return ceil_div(count, kNormLanes) * kNormLanes; }

// Positions that the Gram form takes together.
inline int64_t gram_width(int64_t positions) {
  return padded_width(std::min(positions, kNormPanel));
}

// How many of `items` equal items that multiply `work` times together a thread should take at least.
inline int64_t norm_grain(int64_t items, double work) {
  return std::max<int64_t>(
      1, static_cast<int64_t>(kNormGrain * static_cast<double>(items) / std::max(work, 1.0)));
}

// The two forms' multiplications a sample, as the loops here really do them: lanes are padded, and
// Gram does the lower half and the whole diagonal panels.
inline double direct_work(const LayerShape& s) {
  return static_cast<double>(s.groups) * s.positions * s.columns * padded_width(s.channels);
}
inline double gram_work(const LayerShape& s) {
  const double panels = static_cast<double>(ceil_div(s.positions, kNormPanel));
  const double products = s.positions * gram_width(s.positions) * (panels + 1) / 2;
  // Every element is transposed once, which takes as long as about eight multiplications.
  return static_cast<double>(s.groups) * (products + 8.0 * s.positions) *
         static_cast<double>(s.columns + s.channels);
}

inline bool prefers_gram(const LayerShape& s) { return gram_work(s) < direct_work(s); }

// ---- direct: ||A^T G||^2, a block of channels and columns at a time ----

// How the product [d, p] of every group is cut, by the shape alone.
struct NormBlocks {
  explicit NormBlocks(const LayerShape& s)
      : panels(ceil_div(s.channels, kNormPanel)),
        panel_width(padded_width(ceil_div(s.channels, std::max<int64_t>(panels, 1)))),
        channel_blocks(ceil_div(panels, kNormBlockPanels)),
        block_panels(ceil_div(panels, std::max<int64_t>(channel_blocks, 1))),
        block_columns(std::min(kNormBlockColumns,
                               kNormBlock / std::max<int64_t>(block_panels * panel_width, 1))),
        column_blocks(std::max<int64_t>(ceil_div(s.columns, block_columns), 1)),
        parts(s.groups * channel_blocks * column_blocks),
        part_size(block_panels * std::min(s.columns, block_columns) * panel_width) {}

  int64_t panels, panel_width;
  int64_t channel_blocks, block_panels;  // panels a block
  int64_t block_columns, column_blocks;
  int64_t parts;      // blocks of all groups
  int64_t part_size;  // floats of a block: [panel][column][panel_width]
};

// One block of one group: which channels and columns.
struct NormPart {
  NormPart(const NormBlocks& blocks, const LayerShape& s, int64_t part)
      : group(part / blocks.column_blocks / blocks.channel_blocks),
        first_panel(part / blocks.column_blocks % blocks.channel_blocks * blocks.block_panels),
        end_panel(std::min(first_panel + blocks.block_panels, blocks.panels)),
        first_column(part % blocks.column_blocks * blocks.block_columns),
        columns(std::min(s.columns - first_column, blocks.block_columns)) {}

  int64_t group, first_panel, end_panel, first_column, columns;
};

template <class Source>
NormResult direct_norms(const Source& source, const WeightGrads& out) {
  const LayerShape& s = source.shape();
  const NormBlocks blocks(s);
  NormResult result{std::vector<double>(s.batch), std::vector<double>(s.batch)};
  if (s.batch == 0 || s.positions == 0 || blocks.parts == 0) {
    if (out.weight != nullptr) std::fill_n(out.weight, s.groups * s.channels * s.columns, 0.0f);
    if (out.bias != nullptr) std::fill_n(out.bias, s.groups * s.channels, 0.0f);
    return result;
  }
  int64_t copies = std::clamp<int64_t>(ceil_div(kNormItems, blocks.parts), 1, s.batch);
  if (out.weight != nullptr) {
    const int64_t bytes = std::max<int64_t>(blocks.parts * blocks.part_size * 4, 1);
    copies = std::min(copies, std::max<int64_t>(kNormCopiesBytes / bytes, 1));
  }
  const int64_t items = copies * blocks.parts, rows = s.groups * blocks.panels;
  const auto channels_of = [&](int64_t panel) {
    return std::min(s.channels - panel * blocks.panel_width, blocks.panel_width);
  };
  std::vector<double> weight_norms(blocks.parts * s.batch), bias_norms(rows * s.batch);
  std::vector<float> weight_sums(out.weight != nullptr ? items * blocks.part_size : 0);
  std::vector<float> bias_sums(copies * rows * blocks.panel_width);

  const double work = static_cast<double>(s.batch) * direct_work(s);
  torch::stable::parallel_for(0, items, norm_grain(items, work), [&](int64_t begin, int64_t end) {
    Source mine = source;
    const bool split = mine.chunks() > 1;
    std::vector<float> packed(std::min(s.positions, mine.chunk_positions()) * blocks.panel_width);
    std::vector<float> product(split ? blocks.part_size : 0);
    std::vector<float> sums(blocks.block_panels * blocks.panel_width);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t copy = item / blocks.parts, part_index = item % blocks.parts;
      const NormPart part(blocks, s, part_index);
      for (int64_t b = copy * s.batch / copies; b < (copy + 1) * s.batch / copies; ++b) {
        double norm_sq = 0;
        std::fill(sums.begin(), sums.end(), 0.0f);
        for (int64_t chunk = 0; chunk < mine.chunks(); ++chunk) {
          const NormOperand a = mine.operand(b, part.group, part.first_column, part.columns, chunk);
          for (int64_t panel = part.first_panel; panel < part.end_panel; ++panel) {
            const int64_t here = panel - part.first_panel, channels = channels_of(panel);
            const int64_t width = padded_width(channels);
            mine.pack(b, part.group, panel * blocks.panel_width, channels, chunk, width,
                      packed.data(), sums.data() + here * blocks.panel_width);
            const int64_t place = here * part.columns * blocks.panel_width;
            const NormSums to{
                split ? product.data() + place : nullptr, chunk == 0, chunk + 1 == mine.chunks(),
                out.weight != nullptr ? weight_sums.data() + item * blocks.part_size + place
                                      : nullptr,
                &norm_sq};
            FASTSEL_DISPATCH_ISA(panel_product, a, packed.data(), width, width, to);
          }
        }
        weight_norms[part_index * s.batch + b] = norm_sq;
        if (part.first_column > 0) continue;  // the blocks of the first columns see to the bias
        for (int64_t panel = part.first_panel; panel < part.end_panel; ++panel) {
          const float* sum = sums.data() + (panel - part.first_panel) * blocks.panel_width;
          const int64_t row = part.group * blocks.panels + panel;
          float* bias = bias_sums.data() + (copy * rows + row) * blocks.panel_width;
          for (int64_t i = 0; i < channels_of(panel); ++i) {
            bias_norms[row * s.batch + b] += static_cast<double>(sum[i]) * sum[i];
            bias[i] += sum[i];
          }
        }
      }
    }
  });

  for (int64_t part = 0; part < blocks.parts; ++part)
    for (int64_t b = 0; b < s.batch; ++b) result.weight[b] += weight_norms[part * s.batch + b];
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t b = 0; b < s.batch; ++b) result.bias[b] += bias_norms[row * s.batch + b];
  if (out.bias == nullptr) return result;

  torch::stable::parallel_for(
      0, blocks.parts, norm_grain(blocks.parts, 4.0 * items * blocks.part_size),
      [&](int64_t begin, int64_t end) {
        for (int64_t index = begin; index < end; ++index) {
          const NormPart part(blocks, s, index);
          const float* sums = weight_sums.data() + index * blocks.part_size;
          for (int64_t panel = part.first_panel; panel < part.end_panel; ++panel) {
            const int64_t first = part.group * s.channels + panel * blocks.panel_width;
            const int64_t place = (panel - part.first_panel) * part.columns * blocks.panel_width;
            FASTSEL_DISPATCH_ISA(unpack_sum, sums + place, copies, blocks.parts * blocks.part_size,
                                 part.columns, padded_width(channels_of(panel)), channels_of(panel),
                                 out.weight + first * s.columns + part.first_column, s.columns);
          }
        }
      });
  for (int64_t channel = 0; channel < s.groups * s.channels; ++channel) {
    const int64_t group = channel / s.channels, place = channel % s.channels;
    const int64_t row = group * blocks.panels + place / blocks.panel_width;
    double sum = 0;
    for (int64_t copy = 0; copy < copies; ++copy)
      sum += bias_sums[(copy * rows + row) * blocks.panel_width + place % blocks.panel_width];
    out.bias[channel] = static_cast<float>(sum);
  }
  return result;
}

// ---- Gram: <A A^T, G G^T>, a panel of positions at a time; never more than T x 64 of either ----

// A A^T for positions [0, end) against those of the panel that begins at `begin`, to product
// [end, width]. A^T lies in panels: [panel][row][width].
inline void gram_panel(const std::vector<float>& transposed, int64_t rows, int64_t begin,
                       int64_t end, int64_t width, std::vector<const float*>& columns,
                       float* product) {
  for (int64_t t = 0; t < end; ++t)
    columns[t] = transposed.data() + t / width * rows * width + t % width;
  const int64_t line = 0;
  const NormOperand a{columns.data(), end, &line, 1, rows, width};
  const NormSums to{product, true, true, nullptr, nullptr};
  FASTSEL_DISPATCH_ISA(panel_product, a, transposed.data() + begin * rows, width, width, to);
}

// What a thread holds for the Gram form of one sample.
struct GramBuffers {
  explicit GramBuffers(const LayerShape& s)
      : width(gram_width(s.positions)),
        a(s.columns * ceil_div(s.positions, kNormPanel) * width),
        g(s.channels * ceil_div(s.positions, kNormPanel) * width),
        aa(s.positions * width),
        gg(s.positions * width),
        columns(s.positions) {}

  int64_t width;
  std::vector<float> a, g;    // [panel][d or p][width]
  std::vector<float> aa, gg;  // [T, width]
  std::vector<const float*> columns;
};

// One sample and group: adds the sum, and the sum of the absolute values of its terms.
template <class Source>
void gram_norm(Source& source, int64_t sample, int64_t group, GramBuffers& buffers, double* norm_sq,
               double* magnitude) {
  const LayerShape& s = source.shape();
  const int64_t width = buffers.width;
  source.transpose_a(sample, group, width, buffers.a.data());
  source.transpose_g(sample, group, width, buffers.g.data());
  const float* aa = buffers.aa.data();
  const float* gg = buffers.gg.data();
  for (int64_t begin = 0; begin < s.positions; begin += kNormPanel) {
    const int64_t end = std::min(begin + kNormPanel, s.positions);
    gram_panel(buffers.a, s.columns, begin, end, width, buffers.columns, buffers.aa.data());
    gram_panel(buffers.g, s.channels, begin, end, width, buffers.columns, buffers.gg.data());
    double off_diagonal = 0, off_magnitude = 0;
    FASTSEL_DISPATCH_ISA(dot, aa, gg, begin * width, &off_diagonal, &off_magnitude);
    FASTSEL_DISPATCH_ISA(dot, aa + begin * width, gg + begin * width, (end - begin) * width,
                         norm_sq, magnitude);
    *norm_sq += 2 * off_diagonal;
    *magnitude += 2 * off_magnitude;
  }
}

// Samples whose sums cancel, or are not finite, are left to the direct form: `cancelled` names them.
template <class Source>
std::vector<double> gram_norms(const Source& source, std::vector<int64_t>& cancelled) {
  const LayerShape& s = source.shape();
  std::vector<double> norms(s.batch), magnitudes(s.batch);
  if (s.positions == 0) return norms;
  const double work = static_cast<double>(s.batch) * gram_work(s);
  torch::stable::parallel_for(0, s.batch, norm_grain(s.batch, work),
                              [&](int64_t begin, int64_t end) {
                                Source mine = source;
                                GramBuffers buffers(s);
                                for (int64_t b = begin; b < end; ++b)
                                  for (int64_t group = 0; group < s.groups; ++group)
                                    gram_norm(mine, b, group, buffers, &norms[b], &magnitudes[b]);
                              });
  for (int64_t b = 0; b < s.batch; ++b)
    if (!(magnitudes[b] <= kGramCancellation * norms[b])) cancelled.push_back(b);
  return norms;
}

// A source with only some of another's samples.
template <class Source>
class SomeSamples : public Source {
 public:
  SomeSamples(const Source& source, const std::vector<int64_t>& samples)
      : Source(source), samples_(&samples), shape_(source.shape()) {
    shape_.batch = static_cast<int64_t>(samples.size());
  }
  const LayerShape& shape() const { return shape_; }
  NormOperand operand(int64_t sample, int64_t group, int64_t first, int64_t count, int64_t chunk) {
    return Source::operand((*samples_)[sample], group, first, count, chunk);
  }
  int64_t pack(int64_t sample, int64_t group, int64_t first, int64_t count, int64_t chunk,
               int64_t width, float* packed, float* column_sums) {
    return Source::pack((*samples_)[sample], group, first, count, chunk, width, packed,
                        column_sums);
  }

 private:
  const std::vector<int64_t>* samples_;
  LayerShape shape_;
};

// The squared norms [B] by the given form, or by the cheaper one.
template <class Source>
std::vector<double> weight_norms(const Source& source, NormForm form) {
  const bool gram =
      form == NormForm::gram || (form == NormForm::automatic && prefers_gram(source.shape()));
  if (!gram) return direct_norms(source, {}).weight;
  std::vector<int64_t> cancelled;
  std::vector<double> norms = gram_norms(source, cancelled);
  if (cancelled.empty()) return norms;
  const std::vector<double> exact = direct_norms(SomeSamples<Source>(source, cancelled), {}).weight;
  for (size_t i = 0; i < cancelled.size(); ++i) norms[cancelled[i]] = exact[i];
  return norms;
}

inline Tensor to_tensor(const std::vector<double>& norms, const Tensor& like) {
  const Tensor out = empty({static_cast<int64_t>(norms.size())}, ScalarType::Float, like);
  float* p = mutable_data<float>(out);
  for (size_t i = 0; i < norms.size(); ++i) p[i] = static_cast<float>(norms[i]);
  return out;
}

}  // namespace fastsel::cpu
