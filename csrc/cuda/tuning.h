// Numbers that decide speed and never the result. Each says what chose it.
#pragma once

#include <cstdint>

namespace fastsel::cuda {

// ---- topk ----

// Keys a thread holds in registers: with 32 the kernels take about 100 registers and spill nothing
// (nvcc 13, sm_80 and sm_90).
inline constexpr int kTopkRegisterKeys = 32;

// Rows up to 128 * 32 = 4096 columns: a small block and short histograms, for many rows at once.
inline constexpr int kTopkSmallThreads = 128;
inline constexpr int kTopkSmallDigitBits = 8;
inline constexpr int kTopkSmallResident =
    5;  // blocks a multiprocessor: 65,536 registers / 128 threads / 100

// Rows up to 512 * 32 = 16,384 columns, where AIR Top-K too changes to one block.
inline constexpr int kTopkRegisterThreads = 512;
inline constexpr int kTopkRegisterResident = 1;  // by the same count

// 11-bit digits: three passes over float32, two over 16-bit keys (AIR Top-K's choice); 8 KB of
// histogram.
inline constexpr int kTopkDigitBits = 11;

inline constexpr int kTopkSharedThreads = 1024;
inline constexpr int kTopkGridThreads = 1024;

// The longest result that is sorted inside the kernel; its entries take 32 KB of shared memory.
inline constexpr unsigned kTopkSortLimit = 4096;

// Rows up to this long take one block even if most multiprocessors stay idle: 32 keys a thread, as
// in the registers.
inline constexpr unsigned kTopkOneBlockColumns = 32768;

// A block of a grid takes at least this many columns: with less, reading a share takes less time
// than the grid barriers that sharing costs (an estimate from 32 KB at about 30 bytes a nanosecond,
// not a measurement).
inline constexpr unsigned kTopkMinChunk = 8192;

// ---- weighted_sample, neighbor_sample ----
// Estimates, not measurements: enough warps to hide latency, each of which takes several draws where
// there are many.

inline constexpr int kWeightedThreads = 256;
inline constexpr int kWeightedBlocksPerMultiprocessor = 8;

// ---- knn ----
// Estimates, not measurements.

// The most neighbours: lists are sorted by one warp.
inline constexpr int64_t kKnnMost = 1024;

// Bytes that the lists of the queries of one launch may take.
inline constexpr int64_t kKnnWorkspace = 256 << 20;

// Blocks that fill a multiprocessor: 25 KB of shared memory and 256 threads each.
inline constexpr int kKnnBlocksPerMultiprocessor = 4;

// ---- scores ----
// Estimates from an H200's figures (132 multiprocessors, 4.3 TB/s), not measurements.

// Up to this many classes eight lanes take a row, so that a warp of short rows is not mostly idle
// lanes.
inline constexpr int64_t kScoresShortRow = 128;

// Up to this many classes a warp takes a row: 16 KB, four rounds of 16-byte loads with four in
// flight.
inline constexpr int64_t kScoresWarpRow = 4096;

inline constexpr int kScoresThreads = 256;

// Long rows get several blocks when there are too few rows to fill the multiprocessors, each with
// at least this many classes, so that a block's sums outweigh its start and the second launch.
inline constexpr int64_t kScoresMinSplit = 8192;

// How many blocks of kScoresThreads fill a multiprocessor: 2048 threads.
inline constexpr int kScoresBlocksPerMultiprocessor = 8;

// Classes of a row that one warp takes in the backward pass.
inline constexpr int64_t kScoresBackwardChunk = 2048;

// ---- adaselection_ ----
// Estimates from an H200's figures, not measurements.

// Up to this many samples a small block: four samples a thread, whose loads and exponentials
// overlap, while few warps keep the exchanges of totals and the barriers short.
inline constexpr int64_t kAdaSelectionSmallBatch = 1024;
inline constexpr int kAdaSelectionSmallThreads = 256;

// Up to this many samples one block: its shared memory holds them, and it needs less time than the
// barriers of a grid and a second launch.
inline constexpr int64_t kAdaSelectionBlockBatch = 8192;
inline constexpr int kAdaSelectionThreads = 512;

// Samples of a thread that are worked on together: a round of the block's threads.
inline constexpr int kAdaSelectionUnroll = 4;

// The least a block of a grid takes.
inline constexpr int64_t kAdaSelectionRound = kAdaSelectionThreads * kAdaSelectionUnroll;

// ---- affine_grad_norm_sq, bias_grad_norm_sq ----
// Estimates from an H200's figures, not measurements.

inline constexpr int kAffineThreads = 256;
inline constexpr int kAffineResident = 2;  // blocks a multiprocessor at least: up to 128 registers

// Terms of a thread whose loads are under way together, and that are added in float before they go
// to double: four roundings of 6e-8 at most.
inline constexpr int kAffineUnroll = 4;

// How many blocks fill a multiprocessor: 1024 threads with four or eight 16-byte loads under way each
// cover its share of the memory's latency twice.
inline constexpr int kAffineBlocksPerMultiprocessor = 4;

// The least number of elements worth a block of their own: about the 4 us that a multiprocessor reads
// them in, as long as a second launch takes.
inline constexpr int64_t kAffineLittleWork = 16384;

inline constexpr int kAffineSquaresThreads = 512;

// ---- embedding_grad_norm_sq ----
// Estimates from an H200's figures, not measurements.

// Samples of up to this many tokens are sorted in shared memory: 12 bytes each, 48 KB. Longer ones
// take torch's segmented sort, whose several launches then weigh little.
inline constexpr int64_t kEmbeddingSortLimit = 4096;
inline constexpr int kEmbeddingSortThreads = 512;

inline constexpr int kEmbeddingThreads = 256;
inline constexpr int kEmbeddingResident =
    2;  // blocks a multiprocessor at least: up to 128 registers

// Rows whose loads are under way together: with 16 warps a multiprocessor 32 KB, more than latency
// times bandwidth. Eight of them make the kernel spill registers (nvcc 13, sixteen-bit gradients).
inline constexpr int kEmbeddingUnroll = 4;

// Warps a multiprocessor is given: twice what it holds at once, so that uneven ones even out.
inline constexpr int kEmbeddingWarpsPerMultiprocessor = 32;

// The most chunks a sample is cut into: tokens that reach over their borders are added one chunk after
// the other.
inline constexpr int64_t kEmbeddingMostChunks = 256;

// ---- linear_grad_norm_sq, conv_grad_norm_sq ----
// Estimates from the instruction rates and register files of an A100 and an H200, not measurements.

inline constexpr int kGradNormThreads = 256;  // of the kernels without tiles
inline constexpr int kGradNormBlocksPerMultiprocessor = 8;

// Stages of a product's depth in shared memory: two on their way while one is multiplied.
inline constexpr int kProductStages = 3;

// Blocks that share a multiprocessor, which sets the registers of a thread: the 64-row tile's have
// 128 threads, the 128-row tile's 256. Splitting float32 values takes registers, and where it has
// fewer than this the compiler spills some (nvcc 13); with two sums a thread of the 128-row tile
// takes all 255 in any case.
template <class T>
inline constexpr int kProductSmallResident = sizeof(T) == 2 ? 4 : 3;
template <class T>
inline constexpr int kProductLargeResident = sizeof(T) == 2 ? 2 : 1;

// What a multiply-add in the 64-row tile costs beside one in the 128-row tile: it loads a fragment
// from shared memory 1.3 times as often, and a value from global memory twice as often. And how
// many of its blocks keep a multiprocessor about as busy as one of the others.
inline constexpr double kProductSmallCost = 1.5;
inline constexpr int kProductSmallBusy = 2;

// The depth of a stage: so much is multiplied whether it exists or not.
inline constexpr int64_t kProductDepth = 32;

// What a multiply-add of the Gram form costs beside one of the direct form.
inline constexpr double kGramCost = 1.0;

// Linear layers of few positions share a tile, up to this many of 16 or 32 rows each. A
// multiply-add costs more again, because a fragment loaded serves two of them instead of eight.
inline constexpr int64_t kPackedMostRows = 32;
inline constexpr double kPackedCost = 3;

// Blocks of a grid, at most: many times what is resident, so that the last ones are a small share.
inline constexpr int kProductBlocksPerMultiprocessor = 64;

// Partial sums of a sample that a warp still adds faster than a block starts to.
inline constexpr int64_t kFinishWarpPartials = 512;

// One position: the lengths of the two vectors together up to which eight lanes or a warp take a
// sample, and the least that one of several blocks takes.
inline constexpr int64_t kOuterShort = 256;
inline constexpr int64_t kOuterWarp = 8192;
inline constexpr int64_t kOuterMinSplit = 8192;

// Small groups: the columns of the weight that a thread sums side by side, for one value of the
// gradient read; the cost of such a multiply-add, with its bounds checks and address, beside one on
// the tensor cores; and the positions up to which a warp is enough.
inline constexpr int kNarrowColumns = 8;
inline constexpr double kNarrowCost = 16;
inline constexpr int64_t kNarrowWarpPositions = 256;

}  // namespace fastsel::cuda
