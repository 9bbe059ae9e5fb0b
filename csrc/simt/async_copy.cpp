#include "simt/async_copy.h"

#include <cstring>
#include <stdexcept>
#include <string>

#include "simt/machine_state.h"

namespace fastsel::simt {

namespace {

void carry_out(const AsyncCopy& copy) {
  std::memcpy(copy.shared, copy.global, static_cast<size_t>(copy.valid));
  std::memset(static_cast<char*>(copy.shared) + copy.valid, 0,
              static_cast<size_t>(16 - copy.valid));
}

}  // namespace

void async_copy_16(void* shared, const void* global, int valid) {
  if (valid < 0 || valid > 16)
    throw std::runtime_error("simt: an asynchronous copy of " + std::to_string(valid) + " bytes");
  check_alignment(shared, 16);
  check_alignment(global, 16);
  const AsyncCopy copy{shared, global, valid};
  const bool at_once = machine.order == Order::reverse ||
                       (machine.order == Order::random && (next_random() & 1) != 0);
  if (at_once)
    carry_out(copy);
  else
    current->copies.push_back(copy);
}

void async_copy_commit() { current->copy_groups.push_back(current->copies.size()); }

void async_copy_wait(int pending) {
  auto& groups = current->copy_groups;
  auto& copies = current->copies;
  if (groups.size() <= static_cast<size_t>(pending)) return;
  const size_t finished = groups.size() - static_cast<size_t>(pending);
  const size_t end = groups[finished - 1];
  for (size_t i = 0; i < end; ++i) carry_out(copies[i]);
  copies.erase(copies.begin(), copies.begin() + static_cast<std::ptrdiff_t>(end));
  groups.erase(groups.begin(), groups.begin() + static_cast<std::ptrdiff_t>(finished));
  for (size_t& group : groups) group -= end;
}

}  // namespace fastsel::simt
