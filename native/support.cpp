/* Errors, threads, the choice of instruction set, and what words and codes have in common. */
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstring>
#include <exception>
#include <mutex>
#include <thread>

#if !defined(_WIN32)
#include <pthread.h>
#endif
#if defined(LNS_HAVE_AVX2) || defined(LNS_HAVE_AVX512)
#include <cpuid.h>
#endif

#include "internal.h"

namespace lns {

void fail(int32_t status, const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  throw Failure{status, text};
}

int32_t report(lns_error* error, int32_t status, const char* message) noexcept {
  if (error && error->text && error->size) {
    std::strncpy(error->text, message, error->size - 1);
    error->text[error->size - 1] = 0;
  }
  return status;
}

void add_to(lns_counts* counts, const lns_counts& found, std::mutex& mutex) {
  if (!counts) return;
  std::lock_guard<std::mutex> lock(mutex);
  counts->total += found.total;
  counts->saturated += found.saturated;
  counts->flushed += found.flushed;
  counts->saturated_negative += found.saturated_negative;
}

int64_t product(int64_t a, int64_t b) {
  int64_t result;
  if (a < 0 || b < 0 || __builtin_mul_overflow(a, b, &result) || result > INT64_MAX / 64) {
    fail(LNS_BAD_VALUE, "sizes %lld and %lld are beyond what memory can hold", static_cast<long long>(a),
         static_cast<long long>(b));
  }
  return result;
}

void check_format(lns_format f, const char* what) {
  if (f.bits < 2 || f.bits > 16) fail(LNS_BAD_VALUE, "%s: bits must be 2 to 16, not %d", what, f.bits);
  if (f.is_signed != 0 && f.is_signed != 1) fail(LNS_BAD_VALUE, "%s: signed must be 0 or 1, not %d", what, f.is_signed);
}

Output::Output(lns_output o)
    : max_code(lns::max_code(o.format)),
      least(o.underflow_min ? 1 : 0),
      sign_bit(o.format.is_signed ? 1u << (o.format.bits - 1) : 0),
      bytes(bytes_of(o.format)) {
  check_format(o.format, "output");
  if (o.underflow_min != 0 && o.underflow_min != 1) {
    fail(LNS_BAD_VALUE, "underflow must be 0 or 1, not %d", o.underflow_min);
  }
}

void RawCode::build(const int64_t* sorted, int64_t count) {
  if (count < 0 || count > (1 << 28))
    fail(LNS_BAD_VALUE, "thresholds: %lld are too many", static_cast<long long>(count));
  thresholds.resize(static_cast<size_t>(count) + 1);
  thresholds32.resize(static_cast<size_t>(count) + 1);
  for (int64_t i = 0; i < count; ++i) {
    if (sorted[i] < 1 || (i && sorted[i] < sorted[i - 1])) {
      fail(LNS_BAD_VALUE, "thresholds must be sorted and at least 1; entry %lld is not", static_cast<long long>(i));
    }
    thresholds[static_cast<size_t>(i)] = static_cast<uint64_t>(sorted[i]);
    thresholds32[static_cast<size_t>(i)] =
        static_cast<int32_t>(std::min<int64_t>(sorted[i], UINT32_MAX) - (int64_t{1} << 31));
  }
  thresholds[static_cast<size_t>(count)] = UINT64_MAX;
  threshold_floats.resize(static_cast<size_t>(count) + 1);
  for (int64_t i = 0; i <= count; ++i) {
    const uint64_t t = thresholds[static_cast<size_t>(i)];
    const int below = 63 - __builtin_clzll(t) - 23;
    /* a significand of 2^24 carries into the exponent */
    const uint64_t significand = below <= 0 ? t << -below : (t >> below) + ((t & ((uint64_t{1} << below) - 1)) != 0);
    threshold_floats[static_cast<size_t>(i)] =
        static_cast<int32_t>((uint64_t{127 + 22} << 23) + (static_cast<uint64_t>(below) << 23) + significand);
  }
  thresholds32[static_cast<size_t>(count)] = INT32_MAX;
  /* about one threshold to an entry */
  bits = 1;
  while (bits < 12 && (int64_t{48} << bits) < 2 * count) ++bits;
  const int64_t slots = int64_t{64} << bits;
  start.resize(static_cast<size_t>(slots));
  int64_t k = 0;
  steps = 0;
  for (int64_t slot = 0; slot < slots; ++slot) {
    /* the magnitudes with this leading one and these bits, which are one magnitude where it has fewer */
    const int p = static_cast<int>(slot >> bits);
    const uint64_t mantissa = (uint64_t{1} << bits) + static_cast<uint64_t>(slot & ((int64_t{1} << bits) - 1));
    const uint64_t first = p >= bits ? mantissa << (p - bits) : mantissa >> (bits - p);
    const uint64_t last = p >= bits ? first + ((uint64_t{1} << (p - bits)) - 1) : first;
    const auto reached = [&](uint64_t magnitude) {
      while (k < count && thresholds[static_cast<size_t>(k)] <= magnitude) ++k;
      return k;
    };
    start[static_cast<size_t>(slot)] = static_cast<int32_t>(reached(first));
    steps = std::max(steps, static_cast<int>(reached(last) - start[static_cast<size_t>(slot)]));
  }
}

/* ---- threads --------------------------------------------------------------------------------------------- */

namespace {

class Pool {
 public:
  void run(int64_t count, int threads, const std::function<void(int64_t)>& body) {
    std::unique_lock<std::mutex> job(job_mutex_, std::try_to_lock);
    if (!job.owns_lock()) {
      /* somebody else computes: their threads are busy, this one is not */
      for (int64_t i = 0; i < count; ++i) body(i);
      return;
    }
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (static_cast<int>(workers_) < threads - 1) {
        std::thread([this, id = workers_] { work(id); }).detach();
        ++workers_;
      }
      body_ = &body;
      count_ = count;
      next_ = 0;
      failure_ = nullptr;
      wanted_ = threads - 1;
      running_ = wanted_;
      ++generation_;
    }
    wake_.notify_all();
    take();
    spin([&] { return running_.load(std::memory_order_acquire) == 0; });
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return running_ == 0; });
    body_ = nullptr;
    if (failure_) std::rethrow_exception(failure_);
  }

 private:
  /* Wait for a moment without giving up the processor. */
  template <class Ready>
  static void spin(Ready ready) {
    const auto until = std::chrono::steady_clock::now() + std::chrono::microseconds(200);
    while (!ready() && std::chrono::steady_clock::now() < until) {
      for (int i = 0; i < 32 && !ready(); ++i) pause();
    }
  }

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  void take() {
    try {
      for (int64_t i = next_++; i < count_; i = next_++) (*body_)(i);
    } catch (...) {
      std::lock_guard<std::mutex> lock(mutex_);
      if (!failure_) failure_ = std::current_exception();
      next_ = count_;
    }
  }

  void work(int id) {
    uint64_t seen = 0;
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      /* layers follow each other closely: a thread that sleeps wakes late */
      lock.unlock();
      spin([&] { return generation_.load(std::memory_order_acquire) != seen; });
      lock.lock();
      wake_.wait(lock, [&] { return generation_ != seen; });
      seen = generation_;
      if (id >= wanted_) continue;
      lock.unlock();
      take();
      lock.lock();
      if (--running_ == 0) done_.notify_one();
    }
  }

  std::mutex job_mutex_, mutex_;
  std::condition_variable wake_, done_;
  int workers_ = 0, wanted_ = 0;
  std::atomic<int> running_{0};
  std::atomic<uint64_t> generation_{0};
  const std::function<void(int64_t)>* body_ = nullptr;
  std::atomic<int64_t> next_{0};
  int64_t count_ = 0;
  std::exception_ptr failure_;
};

/* Never destroyed: threads may still wait in it when the process ends. A forked child has no threads, so it gets a
 * pool of its own. */
std::atomic<Pool*> pool{nullptr};

Pool& the_pool() {
  static std::once_flag once;
  std::call_once(once, [] {
    pool = new Pool;
#if !defined(_WIN32)
    pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });
#endif
  });
  return *pool;
}

}  // namespace

void parallel(int64_t count, int threads, const std::function<void(int64_t)>& body) {
  if (threads < 1) fail(LNS_BAD_VALUE, "threads must be at least 1, not %d", threads);
  if (threads > 1024) threads = 1024;
  if (threads > count) threads = static_cast<int>(count);
  if (threads <= 1) {
    for (int64_t i = 0; i < count; ++i) body(i);
    return;
  }
  the_pool().run(count, threads, body);
}

/* ---- instruction sets ------------------------------------------------------------------------------------- */

namespace {

/* Whole levels of x86-64, as the compiler was told. Compilers that know them by name here are newer than those that
 * compile for them, and so are the names of some features. "avx2" and "avx512f" say too that the system saves the
 * registers. */
#if defined(LNS_HAVE_AVX2) || defined(LNS_HAVE_AVX512)
bool x86_64_v3() {
  constexpr unsigned basic = 1u << 13 /* cmpxchg16b */ | 1u << 22 /* movbe */ | 1u << 23 /* popcnt */ |
                             1u << 27 /* osxsave */ | 1u << 29 /* f16c */;
  constexpr unsigned extended = 1u << 0 /* lahf */ | 1u << 5 /* lzcnt */;
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & basic) == basic && __get_cpuid(0x80000001, &a, &b, &c, &d) &&
         (c & extended) == extended && __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("avx2") &&
         __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
}
#endif
#if defined(LNS_HAVE_AVX512) && !defined(LNS_EMULATE_AVX512)
bool x86_64_v4() {
  return x86_64_v3() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

const Isa* isa_of(int32_t id) {
  switch (id) {
    case LNS_ISA_PORTABLE:
      return &isa_portable();
#ifdef LNS_HAVE_AVX2
    case LNS_ISA_AVX2:
      return x86_64_v3() ? &isa_avx2() : nullptr;
#endif
#ifdef LNS_HAVE_AVX512
    case LNS_ISA_AVX512:
#ifdef LNS_EMULATE_AVX512
      return &isa_avx512();
#else
      return x86_64_v4() && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vpopcntdq")
                 ? &isa_avx512()
                 : nullptr;
#endif
#endif
#ifdef LNS_HAVE_NEON
    case LNS_ISA_NEON:
      return &isa_neon();
#endif
    default:
      return nullptr;
  }
}

const Isa& best_isa() {
#ifdef LNS_EMULATE_AVX512
  constexpr int32_t by_speed[] = {LNS_ISA_AVX2, LNS_ISA_NEON};
#else
  constexpr int32_t by_speed[] = {LNS_ISA_AVX512, LNS_ISA_AVX2, LNS_ISA_NEON};
#endif
  for (int32_t id : by_speed) {
    if (const Isa* isa = isa_of(id)) return *isa;
  }
  return isa_portable();
}

std::atomic<const Isa*> forced{nullptr};

}  // namespace

const Isa& current_isa() {
  static const Isa& best = best_isa();
  const Isa* chosen = forced;
  return chosen ? *chosen : best;
}

}  // namespace lns

using namespace lns;

int32_t lns_abi(void) { return LNS_ABI; }
int32_t lns_isa_in_use(void) { return current_isa().id; }
int32_t lns_isa_available(int32_t isa) { return isa_of(isa) != nullptr; }

int32_t lns_force_isa(int32_t isa, lns_error* error) {
  return guarded(error, [&] {
    const Isa* found = isa == LNS_ISA_AUTO ? nullptr : isa_of(isa);
    if (isa != LNS_ISA_AUTO && !found) fail(LNS_UNSUPPORTED, "this machine or build has no instruction set %d", isa);
    forced = found;
  });
}
