// The scheduler behind emulator.h; x86-64 only, for its ten instructions of context switch.

#include "emulator.h"

#include <cstdlib>
#include <random>
#include <stdexcept>

extern "C" void qadapter_switch(void** save, void* to);
__asm__(R"(
.text
.globl qadapter_switch
.type qadapter_switch, @function
qadapter_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size qadapter_switch, .-qadapter_switch
)");

namespace qadapter {
namespace cuda {
namespace emulator {

Fiber* current = nullptr;
const Launch* launched = nullptr;

namespace {

constexpr size_t kStack = 64 << 10;
constexpr size_t kMostShared = 227 << 10;

void* scheduler_stack;
const char* failure;
std::vector<std::unique_ptr<Block>> cluster_blocks;
std::vector<std::unique_ptr<char[]>> stacks;

void leave(Wait what) {
  current->wait = what;
  qadapter_switch(&current->stack_pointer, scheduler_stack);
}

void enter() {
  launched->body(launched->arguments);
  leave(Wait::done);
  abort();  // a fiber that is done is never resumed
}

void prepare(Fiber& fiber, char* stack) {
  auto top = reinterpret_cast<uintptr_t>(stack + kStack) / 16 * 16;
  void** words = reinterpret_cast<void**>(top) - 8;  // six registers, the return address, padding
  for (int i = 0; i < 8; ++i) words[i] = nullptr;
  words[6] = reinterpret_cast<void*>(&enter);
  fiber.stack_pointer = words;
}

// Releases the groups of `size` fibers that have all arrived. True if there was one.
bool release(std::vector<Fiber>& fibers, Wait what, size_t size) {
  bool any = false;
  for (size_t first = 0; first < fibers.size(); first += size) {
    const auto begin = fibers.begin() + first, end = begin + size;
    if (!std::all_of(begin, end, [&](const Fiber& f) { return f.wait == what; })) continue;
    std::for_each(begin, end, [](Fiber& f) { f.wait = Wait::none; });
    any = true;
  }
  return any;
}

void run_cluster(std::vector<Fiber>& fibers, std::mt19937* random, bool downwards) {
  std::vector<size_t> order(fibers.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = downwards ? order.size() - 1 - i : i;
  for (;;) {
    if (random) std::shuffle(order.begin(), order.end(), *random);
    for (size_t i : order) {
      if (fibers[i].wait != Wait::none) continue;
      current = &fibers[i];
      qadapter_switch(&scheduler_stack, current->stack_pointer);
    }
    const size_t threads = launched->threads;
    bool any = release(fibers, Wait::warp, 32);
    any = release(fibers, Wait::block, threads) || any;
    any = release(fibers, Wait::cluster, fibers.size()) || any;
    if (any) continue;
    for (const Fiber& f : fibers) {
      if (f.wait != Wait::done) fault("a barrier or shuffle that not all threads reach");
    }
    return;
  }
}

}  // namespace

void wait_for(Wait what) { leave(what); }

void fault(const char* message) {
  if (!failure) failure = message;
}

void* shared(const void* key, size_t bytes) {
  Block& block = *current->block;
  for (auto& array : block.arrays) {
    if (array->key == key) return array->bytes.data();
  }
  auto array = std::make_unique<Shared>();
  array->key = key;
  array->bytes.assign(bytes, static_cast<char>(0xff));
  block.arrays.push_back(std::move(array));
  return block.arrays.back()->bytes.data();
}

void* shared_of(int rank, const void* own) {
  Block *mine = current->block, *other = cluster_blocks[rank].get();
  const char* at = static_cast<const char*>(own);
  const char* dynamic = reinterpret_cast<const char*>(mine->dynamic.data());
  if (at >= dynamic && at < dynamic + mine->dynamic.size() * 4) {
    return reinterpret_cast<char*>(other->dynamic.data()) + (at - dynamic);
  }
  for (auto& array : mine->arrays) {
    const char* begin = array->bytes.data();
    if (at < begin || at >= begin + array->bytes.size()) continue;
    current->block = other;
    char* there = static_cast<char*>(shared(array->key, array->bytes.size()));
    current->block = mine;
    return there + (at - begin);
  }
  fault("a pointer into no shared memory");
  return nullptr;
}

const char* run(const Launch& launch) {
  if (launch.threads < 32 || launch.threads > 1024 || launch.threads % 32 ||
      launch.blocks_x < 1 || launch.blocks_x > INT32_MAX || launch.blocks_y < 1 ||
      launch.blocks_y > 65535 || launch.shared_bytes > kMostShared || launch.cluster < 1 ||
      launch.cluster > 8 || launch.blocks_y % launch.cluster) {
    return "invalid configuration argument";
  }
  const char* text = getenv("QADAPTER_EMULATOR_ORDER");
  const int seed = text ? atoi(text) : 0;
  std::mt19937 random(static_cast<unsigned>(seed));
  const size_t count = static_cast<size_t>(launch.threads) * launch.cluster;
  while (stacks.size() < count) stacks.emplace_back(new char[kStack]);
  launched = &launch;
  failure = nullptr;
  for (int64_t x = 0; x < launch.blocks_x && !failure; ++x) {
    for (int y = 0; y < launch.blocks_y && !failure; y += launch.cluster) {
      cluster_blocks.clear();
      std::vector<Fiber> fibers(count);
      for (int rank = 0; rank < launch.cluster; ++rank) {
        auto block = std::make_unique<Block>();
        block->x = static_cast<int>(x), block->y = y + rank, block->rank = rank;
        block->dynamic.resize((launch.shared_bytes + 3) / 4);
        std::fill(block->dynamic.begin(), block->dynamic.end(), __builtin_nanf(""));
        block->slots.assign(launch.threads, ~uint64_t{0});
        for (int thread = 0; thread < launch.threads; ++thread) {
          const size_t i = static_cast<size_t>(rank) * launch.threads + thread;
          fibers[i] = {nullptr, block.get(), thread, Wait::none};
          prepare(fibers[i], stacks[i].get());
        }
        cluster_blocks.push_back(std::move(block));
      }
      run_cluster(fibers, seed > 1 ? &random : nullptr, seed == 1);
    }
  }
  current = nullptr;
  return failure;
}

}  // namespace emulator
}  // namespace cuda
}  // namespace qadapter
