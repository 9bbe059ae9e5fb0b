// The twins of cp.async: copies into shared memory that their thread starts, commits in groups and
// waits for later.
//
// A GPU may carry out a copy at any moment between its start and the wait for its group. In the
// forward order it happens as late as it may, so that a missing wait or barrier shows as memory not
// yet written; in the reverse order at once, so that memory overwritten while others still read it
// shows; in the random order either.
#pragma once

namespace fastsel::simt {

// Starts a copy of 16 bytes of which the first `valid` come from `global` and the others are zero.
void async_copy_16(void* shared, const void* global, int valid);

// Makes one group of the copies started since the last commit.
void async_copy_commit();

// Waits until at most `pending` of the newest groups are unfinished.
void async_copy_wait(int pending);

}  // namespace fastsel::simt
