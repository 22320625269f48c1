// The emulated GPU: a seeded random scheduler of blocks and threads, a detector of races, and the runtime's functions.
//
// Every CUDA thread is a fiber, and all of them share one thread of the system; a limited number of blocks is resident,
// in random order, and the next one starts when one has ended. g++ -fsanitize=thread makes every access to memory in
// csrc/cuda a call to the __tsan_ functions below, which replace the sanitizer's own: each may switch to another fiber
// of any resident block, and asks whether it is ordered after the accesses that it conflicts with, by barriers,
// __syncwarp, or a fence, an atomic (or volatile) write, a read of it and a fence. That stands in for weak memory: the
// values are those of one interleaving, but a program whose values could depend on anything weaker is a race here.
// Without -fsanitize=thread (under AddressSanitizer) barriers, shuffles, fences and atomics alone are seen.
//
// Not modelled: fences of block scope, shuffles as an order of memory, and masks of one warp used at the same time.

#define LRK_SCHEDULER
#include <link.h>
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdarg>
#include <cstdio>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "cuda_runtime.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace {

constexpr size_t kStack = 256 << 10;
constexpr uint32_t kAll = 0xffffffffu;

struct Settings {
  uint64_t seed = 0;
  int resident = 2;
} settings;

std::string last_error;
int launches = 0, device = 0, launched_on = 0;

struct Random {
  uint64_t state;
  uint64_t operator()() {  // splitmix64
    uint64_t z = state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
  }
  size_t below(size_t n) { return operator()() % n; }
  double unit() { return double(operator()() >> 11) * 0x1p-53; }
};

// ---------------------------------------------------------------------------------------------------------------------
// What happened before what

// One access. `thread` is kSeveral for reads by several threads of one block between two of its barriers.
constexpr uint16_t kSeveral = 0xffff;
struct Stamp {
  uint16_t block, thread;
  uint32_t epoch, time;             // barriers passed by the block; fences passed since then by the thread
  uint32_t place : 31, strong : 1;  // 0: there was no access; strong: atomic or volatile
};

// What a thread knows about a block: all before an epoch, and what some threads did in it, up to a time each.
struct Seen {
  uint32_t epoch = 0;
  std::map<uint16_t, uint32_t> threads;
};
using Clock = std::shared_ptr<const std::map<uint16_t, Seen>>;

Clock join(const Clock& a, const Clock& b) {
  if (a == b || !b) return a;
  if (!a) return b;
  auto both = std::make_shared<std::map<uint16_t, Seen>>(*a);
  for (const auto& [block, seen] : *b) {
    Seen& mine = (*both)[block];
    if (seen.epoch > mine.epoch) mine = seen;
    if (seen.epoch < mine.epoch) continue;
    for (const auto& [thread, time] : seen.threads) mine.threads[thread] = std::max(mine.threads[thread], time);
  }
  return both;
}

struct Cell {
  Stamp write, read;
};

// The last accesses of every address, in cells of two bytes (global memory) or one (shared memory).
struct Shadow {
  const int shift;
  uintptr_t last = ~uintptr_t(0);
  Cell* page = nullptr;
  std::unordered_map<uintptr_t, std::unique_ptr<Cell[]>> pages;
  std::unordered_map<Cell*, std::vector<Stamp>> readers;  // of other blocks than Cell::read's
  std::unordered_map<Cell*, Clock> released;              // what an atomic or volatile write handed on

  explicit Shadow(int shift) : shift(shift) {}

  Cell& at(uintptr_t address) {
    if (address >> 12 != last) {
      auto& found = pages[last = address >> 12];
      if (!found) found.reset(new Cell[4096 >> shift]());
      page = found.get();
    }
    return page[(address & 4095) >> shift];
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// Threads and blocks

struct Block;

struct Fiber {
  Block* block;
  uint16_t thread;
  char* stack;
  bool started = false, ended = false;
  int spins = 0;
  double priority = 0;
  const void* place = nullptr;  // where it was last
  void* fake_stack = nullptr;   // AddressSanitizer's
  jmp_buf here;
  uint64_t values[32];  // of its warp's lanes, after a shuffle
  uint32_t time = 1;
  Clock known, fenced, pending;  // known; as of the last fence; read by atomics, but not fenced in yet
};

struct Warp {
  uint32_t mask = 0, arrived = 0;
  int line = 0;
  uint64_t values[32];
};

struct Block {
  uint16_t index;
  double priority;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<char> shared;  // its __shared__ variables while another block has its turn
  Shadow shadow{0};
  uint32_t epoch = 1;
  unsigned ended = 0, arrived = 0, count = 0, result = 0;
  int line = 0;
};

struct Launch {
  Random random;
  std::vector<uint16_t> waiting;  // blocks that are not resident yet
  std::vector<std::unique_ptr<Block>> resident;
  std::vector<Fiber*> ready, spinning;
  Fiber* current = nullptr;
  Block* loaded = nullptr;  // whose variables are in place
  Shadow shadow{1};
  void (*body)(void*);
  void* context;
  jmp_buf scheduler;
  ucontext_t entry;
  int64_t stuck = 0;  // turns in which nothing changed, and everybody only waited
  int budget = 1, patience = 1, candidates = 1;
  bool failed = false;
  const void* stack = nullptr;  // the scheduler's own, for AddressSanitizer
  size_t stack_size = 0;
};

Launch* launched = nullptr;
bool inside = false;  // this file is at work: its own accesses are nobody's
std::vector<char*> free_stacks;

Fiber* current() {
  return launched && !inside ? launched->current : nullptr;
}

// ---------------------------------------------------------------------------------------------------------------------
// This library: where its code and its __shared__ (thread-local) variables are

thread_local volatile int in_this_library = 1;

struct Library {
  uintptr_t base = 0;
  char* shared = nullptr;
  size_t size = 0;

  Library() {
    in_this_library = 1;  // the system makes thread-local memory on first use
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* self) {
          auto* library = static_cast<Library*>(self);
          const auto here = uintptr_t(&launched);
          for (int i = 0; i < info->dlpi_phnum; ++i) {
            const auto& segment = info->dlpi_phdr[i];
            const uintptr_t start = info->dlpi_addr + segment.p_vaddr;
            if (segment.p_type == PT_LOAD && here >= start && here < start + segment.p_memsz)
              library->base = info->dlpi_addr;
          }
          if (library->base != info->dlpi_addr) return 0;
          for (int i = 0; i < info->dlpi_phnum; ++i)
            if (info->dlpi_phdr[i].p_type == PT_TLS) library->size = info->dlpi_phdr[i].p_memsz;
          library->shared = static_cast<char*>(info->dlpi_tls_data);
          return 1;
        },
        this);
  }
};

const Library& library() {
  static const Library found;
  return found;
}

bool is_shared(uintptr_t address) {
  const uintptr_t start = uintptr_t(library().shared);
  return address >= start && address < start + library().size;
}

// ---------------------------------------------------------------------------------------------------------------------
// The scheduler

__attribute__((format(printf, 2, 3))) void report(const Fiber* fiber, const char* format, ...) {
  char text[1000];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  last_error = "emulator: ";
  if (fiber) last_error += "block " + std::to_string(fiber->block->index) + ", thread " + std::to_string(fiber->thread);
  last_error += text;
  if (launched) launched->failed = true;
}

// Addresses in messages are offsets in this library, for addr2line.
size_t offset(const void* place) {
  return uintptr_t(place) - library().base;
}

void to_scheduler(Fiber& me) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(me.ended ? nullptr : &me.fake_stack, launched->stack, launched->stack_size);
#endif
  if (_setjmp(me.here) == 0) _longjmp(launched->scheduler, 1);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(me.fake_stack, &launched->stack, &launched->stack_size);
#endif
}

#define FAIL(fiber, ...) (report(fiber, __VA_ARGS__), (fiber)->ended = true, to_scheduler(*(fiber)))

void start() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &launched->stack, &launched->stack_size);
#endif
  Fiber& me = *launched->current;
  inside = false;
  launched->body(launched->context);
  inside = true;
  me.ended = true;
  to_scheduler(me);
}

void resume(Fiber& fiber) {
  Launch& launch = *launched;
  launch.current = &fiber;
  threadIdx.x = fiber.thread;
  blockIdx.x = fiber.block->index;
  if (launch.loaded != fiber.block && library().size != 0) {
    if (launch.loaded) std::memcpy(launch.loaded->shared.data(), library().shared, library().size);
    std::memcpy(library().shared, fiber.block->shared.data(), library().size);
  }
  launch.loaded = fiber.block;
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack;
  __sanitizer_start_switch_fiber(&fake_stack, fiber.stack, kStack);
#endif
  if (_setjmp(launch.scheduler) == 0) {
    if (fiber.started) _longjmp(fiber.here, 1);
    fiber.started = true;
    getcontext(&launch.entry);
    launch.entry.uc_stack.ss_sp = fiber.stack;
    launch.entry.uc_stack.ss_size = kStack;
    makecontext(&launch.entry, start, 0);
    setcontext(&launch.entry);
  }
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
  launch.current = nullptr;
}

char* new_stack() {
  if (free_stacks.empty()) {
    void* memory = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) std::abort();
    mprotect(memory, 4096, PROT_NONE);  // an overflow is a fault, not a surprise
    free_stacks.push_back(static_cast<char*>(memory));
  }
  char* stack = free_stacks.back();
  free_stacks.pop_back();
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stack + 4096, kStack - 4096);
#endif
  return stack;
}

// As many blocks as fit become resident, in any order.
void admit() {
  Launch& launch = *launched;
  while (!launch.waiting.empty() && launch.resident.size() < size_t(settings.resident)) {
    auto block = std::make_unique<Block>();
    std::swap(launch.waiting[launch.random.below(launch.waiting.size())], launch.waiting.back());
    block->index = launch.waiting.back();
    launch.waiting.pop_back();
    block->priority = 2 * launch.random.unit();
    block->shared.assign(library().size, char(0xff));  // what is in shared memory at first is anybody's guess
    block->warps.resize((blockDim.x + 31) / 32);
    block->fibers.resize(blockDim.x);
    for (unsigned i = 0; i < blockDim.x; ++i) {
      Fiber& fiber = block->fibers[i];
      fiber.block = block.get();
      fiber.thread = uint16_t(i);
      fiber.stack = new_stack();
      fiber.priority = launch.random.unit();
      launch.ready.push_back(&fiber);
    }
    launch.resident.push_back(std::move(block));
  }
}

// Out of a few candidates at random, the one that this run favours. Those who only wait for a value come last.
Fiber* choose() {
  Launch& launch = *launched;
  const bool idle = launch.ready.empty() || (!launch.spinning.empty() && launch.random.below(8) == 0);
  std::vector<Fiber*>& from = idle ? launch.spinning : launch.ready;
  if (launch.ready.empty()) ++launch.stuck;
  if (from.empty() || launch.stuck > 2000 + 300 * int64_t(from.size())) return nullptr;
  const auto priority = [&](size_t i) { return from[i]->priority + from[i]->block->priority; };
  size_t best = launch.random.below(from.size());
  for (int k = 1; k < launch.candidates; ++k) {
    const size_t other = launch.random.below(from.size());
    if (priority(other) > priority(best)) best = other;
  }
  std::swap(from[best], from.back());
  Fiber* chosen = from.back();
  from.pop_back();
  return chosen;
}

void report_deadlock() {
  std::string where;
  for (size_t i = 0; i < launched->resident.size() && i < 4; ++i) {
    const Block& block = *launched->resident[i];
    for (const Fiber& fiber : block.fibers) {
      if (fiber.ended) continue;
      char text[100];
      std::snprintf(text, sizeof text, "; block %d, thread %d at {%zx}", block.index, fiber.thread,
                    offset(fiber.place));
      where += text;
      break;
    }
  }
  report(nullptr, "deadlock: no thread can go on, %zu blocks are resident and %zu have not started%s",
         launched->resident.size(), launched->waiting.size(), where.c_str());
}

void retire(Fiber& fiber) {
  Block& block = *fiber.block;
  const Warp& warp = block.warps[fiber.thread / 32];
  launched->stuck = 0;
  if (block.arrived)
    return report(&fiber, " ends while others of its block wait at the barrier of line %d", block.line);
  if (warp.arrived && warp.mask >> fiber.thread % 32 & 1)
    return report(&fiber, " ends while others of its warp wait for it in line %d", warp.line);
  if (++block.ended < block.fibers.size()) return;
  for (const Fiber& each : block.fibers) free_stacks.push_back(each.stack);
  auto& resident = launched->resident;
  launched->loaded = nullptr;
  resident.erase(std::find_if(resident.begin(), resident.end(), [&](auto& each) { return each.get() == &block; }));
  admit();
}

void run(Launch& launch) {
  launched = &launch;
  inside = true;
  const std::vector<char> host(library().shared, library().shared + library().size);
  admit();
  while (!launch.resident.empty() && !launch.failed) {
    Fiber* next = choose();
    if (!next) {
      report_deadlock();
      break;
    }
    resume(*next);
    if (next->ended && !launch.failed) retire(*next);
  }
  for (const auto& block : launch.resident)
    for (const Fiber& each : block->fibers) free_stacks.push_back(each.stack);
  std::memcpy(library().shared, host.data(), host.size());
  inside = false;
  launched = nullptr;
}

void wait(Fiber& me, std::vector<Fiber*>* where) {
  if (where) where->push_back(&me);
  to_scheduler(me);
}

void progress(Fiber& me) {
  me.spins = 0;
  launched->stuck = 0;
}

// Before something that other threads may notice: perhaps they go first.
void point(Fiber& me, const void* place, bool often) {
  Launch& launch = *launched;
  me.place = place;
  if (me.spins > 2) return wait(me, &launch.spinning);
  if (often ? launch.random.below(2) != 0 : --launch.budget > 0) return;
  launch.budget = 1 + int(-std::log(1 - launch.random.unit()) * launch.patience);
  me.priority = launch.random.unit();
  wait(me, &launch.ready);
}

// ---------------------------------------------------------------------------------------------------------------------
// Races

bool knows(const Fiber& me, const Stamp& access) {
  const Block& block = *me.block;
  if (access.block == block.index && (access.epoch < block.epoch || access.thread == me.thread)) return true;
  if (!me.known) return false;
  const auto seen = me.known->find(access.block);
  if (seen == me.known->end()) return false;
  if (seen->second.epoch != access.epoch) return seen->second.epoch > access.epoch;
  const auto time = seen->second.threads.find(access.thread);
  return time != seen->second.threads.end() && time->second >= access.time;
}

// What `me` hands on with a fence: what it knows, and all it has done.
Clock with_own(const Fiber& me) {
  auto own = std::make_shared<std::map<uint16_t, Seen>>();
  (*own)[me.block->index] = {me.block->epoch, {{me.thread, me.time}}};
  return join(me.known, own);
}

void check(Fiber& me, const Stamp& now, const Stamp& before, const char* what, uintptr_t address) {
  if (before.place == 0 || (now.strong && before.strong) || knows(me, before)) return;
  const std::string thread = before.thread == kSeveral ? "several threads" : "thread " + std::to_string(before.thread);
  FAIL(&me, " at {%x}: race on %#zx: %s block %d, %s, at {%x}, with no barrier or fence between", unsigned(now.place),
       address, what, before.block, thread.c_str(), unsigned(before.place));
}

Shadow& shadow_of(const Fiber& me, uintptr_t address) {
  return is_shared(address) ? me.block->shadow : launched->shadow;
}

void note_read(Shadow& shadow, Cell& cell, const Fiber& me, const Stamp& now) {
  const auto merge = [&](Stamp& read) {  // of one block, the latest epoch says it all
    const bool several = read.epoch == now.epoch && read.thread != now.thread;
    const bool strong = now.strong && (read.epoch != now.epoch || read.strong);
    read = now;
    if (several) read.thread = kSeveral;
    read.strong = strong;
  };
  if (cell.read.place == 0 || knows(me, cell.read)) {
    cell.read = now;
  } else if (cell.read.block == now.block) {
    merge(cell.read);
  } else {
    std::vector<Stamp>& readers = shadow.readers[&cell];
    for (Stamp& read : readers)
      if (read.block == now.block) return merge(read);
    readers.push_back(now);
  }
}

void access(Fiber& me, const void* memory, size_t size, bool write, bool strong, const void* place) {
  const uintptr_t first = uintptr_t(memory);
  if (first - uintptr_t(me.stack) < kStack) return;  // local memory
  const bool shared = is_shared(first);
  Shadow& shadow = shadow_of(me, first);
  const Stamp now{me.block->index, me.thread, me.block->epoch, me.time, uint32_t(offset(place)), strong};
  for (uintptr_t at = first >> shadow.shift << shadow.shift; at < first + size; at += uintptr_t(1) << shadow.shift) {
    Cell& cell = shadow.at(at);
    check(me, now, cell.write, write ? "written by" : "read, but written by", at);
    if (!write) {
      if (shared && cell.write.place == 0)
        FAIL(&me, " at {%zx}: reads shared memory that no thread has written", offset(place));
      note_read(shadow, cell, me, now);
      continue;
    }
    check(me, now, cell.read, "written, but read by", at);
    if (!shadow.readers.empty()) {
      const auto others = shadow.readers.find(&cell);
      if (others != shadow.readers.end()) {
        for (const Stamp& read : others->second) check(me, now, read, "written, but read by", at);
        shadow.readers.erase(others);
      }
    }
    cell.write = now;
    cell.read = {};
  }
}

// Atomic and volatile accesses take and hand on what fences have ordered.
void synchronise(Fiber& me, const void* memory, bool reads, bool writes) {
  Shadow& shadow = shadow_of(me, uintptr_t(memory));
  Clock& released = shadow.released[&shadow.at(uintptr_t(memory))];
  if (reads) me.pending = join(me.pending, released);
  if (writes) released = reads ? join(released, me.fenced) : me.fenced;
}

void fence_in(Fiber& me) {
  me.known = join(me.known, me.pending);
  me.pending = nullptr;
}

void fence_out(Fiber& me) {
  me.fenced = with_own(me);
  ++me.time;
}

struct Inside {
  Inside() { inside = true; }
  ~Inside() { inside = false; }
};

}  // namespace

#define PLACE __builtin_return_address(0)

namespace emulator {

int lane() {
  return int(threadIdx.x % 32);
}

void fail(const char* what) {
  Fiber& me = *current();
  inside = true;
  FAIL(&me, ": %s", what);
  std::abort();  // never: a fiber that has failed is not resumed
}

int barrier(bool predicate, int line) {
  Fiber& me = *current();
  const Inside guard;
  Block& block = *me.block;
  me.place = PLACE;
  if (block.ended)
    FAIL(&me, " is at the barrier of line %d, but %u threads of its block have ended", line, block.ended);
  if (block.arrived && block.line != line)
    FAIL(&me, " is at the barrier of line %d, others of its block are at that of line %d", line, block.line);
  block.line = line;
  block.count += predicate;
  if (++block.arrived < block.fibers.size()) {
    wait(me, nullptr);
    return int(block.result);
  }
  block.result = std::exchange(block.count, 0);
  block.arrived = 0;
  ++block.epoch;
  Clock known;
  for (const Fiber& each : block.fibers) known = join(known, each.known);
  for (Fiber& each : block.fibers) {
    each.known = known;
    each.time = 1;
    if (&each != &me) launched->ready.push_back(&each);
  }
  if (launched->random.below(8) == 0) block.priority = 2 * launched->random.unit();
  progress(me);
  wait(me, &launched->ready);
  return int(block.result);
}

const uint64_t* exchange(uint32_t mask, uint64_t value, bool fence, int line) {
  Fiber& me = *current();
  const Inside guard;
  Block& block = *me.block;
  Warp& warp = block.warps[me.thread / 32];
  Fiber* lanes = &block.fibers[me.thread / 32 * 32];
  const uint32_t size = std::min<uint32_t>(32, uint32_t(block.fibers.size()) - me.thread / 32 * 32);
  me.place = PLACE;
  mask &= kAll >> (32 - size);
  if (!(mask >> lane() & 1)) FAIL(&me, " in line %d is not in its own mask %#x", line, mask);
  if (warp.arrived && (warp.mask != mask || warp.line != line))
    FAIL(&me, " is in line %d (mask %#x), others of its warp in line %d (mask %#x)", line, mask, warp.line, warp.mask);
  for (uint32_t i = 0; i < size; ++i)
    if (mask >> i & 1 && lanes[i].ended) FAIL(&me, " in line %d waits for lane %u, which has ended", line, i);
  warp.mask = mask;
  warp.line = line;
  warp.values[lane()] = value;
  warp.arrived |= 1u << lane();
  if (warp.arrived != mask) {
    wait(me, nullptr);
    return me.values;
  }
  warp.arrived = 0;
  Clock known;
  for (uint32_t i = 0; fence && i < size; ++i)
    if (mask >> i & 1) known = join(known, with_own(lanes[i]));
  for (uint32_t i = 0; i < size; ++i) {
    if (!(mask >> i & 1)) continue;
    std::memcpy(lanes[i].values, warp.values, sizeof warp.values);
    if (fence) {
      lanes[i].known = known;
      ++lanes[i].time;
    }
    if (&lanes[i] != &me) launched->ready.push_back(&lanes[i]);
  }
  progress(me);
  point(me, me.place, true);
  return me.values;
}

void fence() {
  Fiber& me = *current();
  const Inside guard;
  point(me, PLACE, true);
  fence_in(me);
  fence_out(me);
}

void sleep() {
  Fiber& me = *current();
  const Inside guard;
  me.spins = 3;
  point(me, PLACE, true);
}

void read_only(const void* memory, size_t size) {
  Fiber* me = current();
  if (!me) return;
  const Inside guard;
  for (uintptr_t at = uintptr_t(memory); at < uintptr_t(memory) + size; at += 2)
    if (launched->shadow.at(at).write.place)
      FAIL(me, " at {%zx}: __ldg of %#zx, which this launch has written", offset(PLACE), at);
}

// Threads that hold the same value may all write it: the memory changes once.
void write_alike(void* memory, const void* value, size_t size) {
  Fiber& me = *current();
  const Inside guard;
  point(me, PLACE, false);
  if (std::memcmp(memory, value, size) == 0) return;
  access(me, memory, size, true, false, PLACE);
  std::memcpy(memory, value, size);
  progress(me);
}

template <class T>
T combine(Operation operation, T old, T value, T compare) {
  switch (operation) {
    case kLoad:
      return old;
    case kAdd:
      return T(std::make_unsigned_t<T>(old) + std::make_unsigned_t<T>(value));
    case kCompareAndSwap:
      return old == compare ? value : old;
    case kMin:
      return std::min(old, value);
    case kMax:
      return std::max(old, value);
    case kAnd:
      return old & value;
    case kOr:
      return old | value;
    default:
      return value;
  }
}

template <class T>
uint64_t operate(Operation operation, void* memory, uint64_t value, uint64_t compare, const void* place) {
  Fiber* me = current();
  const Inside guard;
  const bool writes = operation != kLoad, reads = operation != kStore;
  if (me) {
    point(*me, place, true);
    if (uintptr_t(memory) % sizeof(T)) FAIL(me, " at {%zx}: an atomic on the odd address %p", offset(place), memory);
    access(*me, memory, sizeof(T), writes, true, place);
    synchronise(*me, memory, reads, writes);
  }
  T& there = *static_cast<T*>(memory);
  const T old = std::exchange(there, combine(operation, there, T(value), T(compare)));
  if (me && there == old)
    ++me->spins;  // only waiting, as far as anybody can see
  else if (me)
    progress(*me);
  return uint64_t(old);
}

uint64_t atomic(Operation operation, void* memory, int size, bool is_signed, uint64_t value, uint64_t compare) {
  if (size == 4 && is_signed) return operate<int32_t>(operation, memory, value, compare, PLACE);
  if (size == 4) return operate<uint32_t>(operation, memory, value, compare, PLACE);
  if (is_signed) return operate<int64_t>(operation, memory, value, compare, PLACE);
  return operate<uint64_t>(operation, memory, value, compare, PLACE);
}

cudaError_t launch(dim3 grid, dim3 block, size_t dynamic_shared, void (*body)(void*), void* context) {
  if (!last_error.empty()) return cudaErrorLaunchFailure;  // as on the device, nothing goes on after a fault
  ++launches;
  launched_on = device;
  if (grid.x < 1 || grid.x > 0xfffe || block.x < 1 || block.x > 1024 || grid.y * grid.z * block.y * block.z != 1 ||
      dynamic_shared != 0) {
    report(nullptr, "a launch of %u blocks, %u threads and %zu bytes of dynamic shared memory", grid.x, block.x,
           dynamic_shared);
    return cudaErrorInvalidConfiguration;
  }
  constexpr int kPatience[] = {2, 10, 60, 400}, kCandidates[] = {1, 2, 6};
  Launch launch;
  launch.random.state = settings.seed++;
  launch.patience = kPatience[launch.random.below(4)];
  launch.candidates = kCandidates[launch.random.below(3)];
  for (unsigned i = 0; i < grid.x; ++i) launch.waiting.push_back(uint16_t(i));
  launch.body = body;
  launch.context = context;
  gridDim = grid;
  blockDim = block;
  run(launch);
  return launch.failed ? cudaErrorLaunchFailure : cudaSuccess;
}

}  // namespace emulator

// ---------------------------------------------------------------------------------------------------------------------
// What g++ -fsanitize=thread and -fsanitize=alignment,bounds call. The compiler says which size, and what is volatile.

#if !defined(__SANITIZE_ADDRESS__)

namespace {

void plain(const void* memory, size_t size, bool write, const void* place) {
  Fiber* me = current();
  if (!me) return;
  const Inside guard;
  point(*me, place, false);
  access(*me, memory, size, write, false, place);
  if (write) progress(*me);
}

void strong(const void* memory, size_t size, bool write, const void* place) {
  Fiber* me = current();
  if (!me) return;
  const Inside guard;
  point(*me, place, true);
  access(*me, memory, size, write, size <= 8, place);
  synchronise(*me, memory, !write, write);
  if (write)
    progress(*me);
  else
    ++me->spins;
}

// The start of every description that the compiler makes of a place in the source.
struct Source {
  const char* file;
  uint32_t line, column;
};

void undefined(const Source* source, const char* what, const void* address) {
  Fiber* me = current();
  const Inside guard;
  if (me)
    FAIL(me, " at %s:%u: %s (%p)", source->file, source->line, what, address);
  else
    report(nullptr, "%s:%u: %s (%p)", source->file, source->line, what, address);
}

}  // namespace

extern "C" {

#define LRK_ACCESSES(size)                              \
  void __tsan_read##size(void* p) {                     \
    plain(p, size, false, PLACE);                       \
  }                                                     \
  void __tsan_write##size(void* p) {                    \
    plain(p, size, true, PLACE);                        \
  }                                                     \
  void __tsan_unaligned_read##size(void* p) {           \
    plain(p, size, false, PLACE);                       \
  }                                                     \
  void __tsan_unaligned_write##size(void* p) {          \
    plain(p, size, true, PLACE);                        \
  }                                                     \
  void __tsan_volatile_read##size(void* p) {            \
    strong(p, size, false, PLACE);                      \
  }                                                     \
  void __tsan_volatile_write##size(void* p) {           \
    strong(p, size, true, PLACE);                       \
  }                                                     \
  void __tsan_unaligned_volatile_read##size(void* p) {  \
    strong(p, size, false, PLACE);                      \
  }                                                     \
  void __tsan_unaligned_volatile_write##size(void* p) { \
    strong(p, size, true, PLACE);                       \
  }
LRK_ACCESSES(1)
LRK_ACCESSES(2)
LRK_ACCESSES(4)
LRK_ACCESSES(8)
LRK_ACCESSES(16)

void __tsan_init() {}
void __tsan_read_range(void* p, size_t size) {
  plain(p, size, false, PLACE);
}
void __tsan_write_range(void* p, size_t size) {
  plain(p, size, true, PLACE);
}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

// std::atomic and the __atomic_ functions, whose order is a fence before (release) or after (acquire).
void __tsan_atomic_thread_fence(int order) {
  if (current() && order != __ATOMIC_RELAXED) emulator::fence();
}
void __tsan_atomic_signal_fence(int) {}

#define LRK_ATOMIC(T, bits, name, operation, signature, value, compare, done)                                 \
  T __tsan_atomic##bits##_##name signature {                                                                  \
    if (Fiber* me = current(); me && order != __ATOMIC_RELAXED && order != __ATOMIC_ACQUIRE) fence_out(*me);  \
    const T old = T(emulator::operate<T>(emulator::operation, p, uint64_t(value), uint64_t(compare), PLACE)); \
    if (Fiber* me = current(); me && order != __ATOMIC_RELAXED && order != __ATOMIC_RELEASE) fence_in(*me);   \
    done;                                                                                                     \
  }
#define LRK_ATOMICS(T, bits)                                                                                   \
  LRK_ATOMIC(T, bits, load, kLoad, (T * p, int order), 0, 0, return old)                                       \
  LRK_ATOMIC(T, bits, store, kStore, (T * p, T x, int order), x, 0, return old)                                \
  LRK_ATOMIC(T, bits, exchange, kExchange, (T * p, T x, int order), x, 0, return old)                          \
  LRK_ATOMIC(T, bits, fetch_add, kAdd, (T * p, T x, int order), x, 0, return old)                              \
  LRK_ATOMIC(T, bits, fetch_sub, kAdd, (T * p, T x, int order), T(0) - x, 0, return old)                       \
  LRK_ATOMIC(T, bits, compare_exchange_strong, kCompareAndSwap, (T * p, T * expected, T x, int order, int), x, \
             *expected, return old == *expected ? 1 : (*expected = old, 0))
LRK_ATOMICS(uint8_t, 8)
LRK_ATOMICS(uint32_t, 32)
LRK_ATOMICS(uint64_t, 64)

void __ubsan_handle_type_mismatch_v1(const Source* source, void* p) {
  undefined(source, p ? "a misaligned address" : "a null pointer", p);
}
void __ubsan_handle_out_of_bounds(const Source* source, void* index) {
  undefined(source, "an index out of bounds", index);
}

}  // extern "C"

#endif

// ---------------------------------------------------------------------------------------------------------------------
// The runtime

namespace {
std::map<void*, size_t> allocated;
}

const char* cudaGetErrorString(cudaError_t error) {
  if (error == cudaErrorLaunchFailure || error == cudaErrorInvalidConfiguration) return last_error.c_str();
  return error == cudaSuccess ? "no error" : "an error of the emulated runtime";
}
const char* cudaGetErrorName(cudaError_t error) {
  return cudaGetErrorString(error);
}
cudaError_t cudaPeekAtLastError() {
  return last_error.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}
cudaError_t cudaGetLastError() {
  return cudaPeekAtLastError();
}
// Device n has n multiprocessors, and each of them takes one block.
cudaError_t cudaGetDevice(int* current) {
  *current = device;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int wanted) {
  if (wanted < 0) return cudaErrorInvalidDevice;
  device = wanted;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int of) {
  if (of < 0 || attribute != cudaDevAttrMultiProcessorCount) return cudaErrorInvalidValue;
  *value = of;
  return cudaSuccess;
}
cudaError_t cudaMalloc(void** memory, size_t size) {
  *memory = std::aligned_alloc(256, (size + 255) / 256 * 256);
  std::memset(*memory, 0xff, size);
  allocated[*memory] = size;
  return cudaSuccess;
}
cudaError_t cudaMallocAsync(void** memory, size_t size, cudaStream_t) {
  return cudaMalloc(memory, size);
}
cudaError_t cudaFree(void* memory) {
  if (memory && allocated.erase(memory) == 0) return cudaErrorInvalidValue;
  std::free(memory);
  return cudaSuccess;
}
cudaError_t cudaFreeAsync(void* memory, cudaStream_t) {
  return cudaFree(memory);
}
cudaError_t cudaMemsetAsync(void* memory, int value, size_t size, cudaStream_t) {
  return std::memset(memory, value, size), cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* target, const void* source, size_t size, cudaMemcpyKind, cudaStream_t) {
  return std::memcpy(target, source, size), cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  return *status = cudaStreamCaptureStatusNone, cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) {
  return cudaSuccess;
}

extern "C" {

// How many blocks really run at the same time is another matter than what the device has: others may be using it.
void emulator_reset(uint64_t seed, int resident) {
  settings = {Random{seed}(), resident};
  last_error.clear();
  launches = device = launched_on = 0;
}
int emulator_device() {
  return device == 0 ? launched_on : -1;
}
const char* emulator_error() {
  return last_error.c_str();
}
int emulator_launches() {
  return launches;
}
size_t emulator_allocations() {
  return allocated.size();
}
}
