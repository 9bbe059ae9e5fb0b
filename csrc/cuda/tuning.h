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

}  // namespace fastsel::cuda
