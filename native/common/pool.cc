#include "common/pool.h"

#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

namespace rarefy::common {
namespace {

constexpr int kMaxThreads = 256;
constexpr int kMaxChunks = 0xffff;
// A thread that sleeps takes 15 to 50 us to wake, as long as a small job. Between two products a caller computes other
// things for some tens or hundreds of microseconds, so a worker looks for the next job for longer than that.
constexpr auto kSpinTime = std::chrono::milliseconds(1);
constexpr auto kLongYield = std::chrono::microseconds(20);

inline void pause_cpu() {
#if RAREFY_X86
    __builtin_ia32_pause();
#else
    std::atomic_signal_fence(std::memory_order_seq_cst);
#endif
}

// A job is published in one word: number of the job (32 bits), its chunks (16), the next chunk (16). A worker claims a
// chunk by a compare-and-swap on the whole word, so it can never take a chunk of a job other than the one whose
// function it has just read: the function changes only after every chunk of the job before is done.
class Pool {
public:
    void run(int num_chunks, int num_threads, ChunkFunction function, void* context) {
        grow(std::min(num_threads, num_chunks) - 1);
        function_.store(function, std::memory_order_relaxed);
        context_.store(context, std::memory_order_relaxed);
        num_helpers_.store(num_threads - 1, std::memory_order_relaxed);
        num_done_.store(0, std::memory_order_relaxed);
        const uint64_t job = (ticket_.load(std::memory_order_relaxed) >> 32) + 1;
        ticket_.store(job << 32 | static_cast<uint64_t>(num_chunks) << 16);  // seq_cst, pairs with wait_for_job()
        if (num_asleep_.load() > 0) {
            const std::lock_guard<std::mutex> lock(mutex_);
            awake_.notify_all();
        }
        work();
        for (int spins = 0; num_done_.load(std::memory_order_acquire) != num_chunks; ++spins) {
            if (spins < 4096) {
                pause_cpu();
            } else {
                std::this_thread::yield();  // the helper that holds the last chunk may wait for this very core
            }
        }
    }

    // What the first chunk that threw has thrown, or null; asked once after run().
    std::exception_ptr take_error() {
        if (!failed_.exchange(false)) return nullptr;
        return std::exchange(error_, nullptr);
    }

private:
    // A system that gives no more threads gets by with those that there are.
    void grow(int num_workers) {
        for (; num_workers_ < std::min(num_workers, kMaxThreads - 1); ++num_workers_) {
            try {
                std::thread([this, index = num_workers_] { serve(index); }).detach();
            } catch (const std::system_error&) {
                return;
            }
        }
    }

    // Claims and runs chunks of the current job until none is left.
    void work() {
        uint64_t ticket = ticket_.load(std::memory_order_acquire);
        while ((ticket & 0xffff) < (ticket >> 16 & 0xffff)) {
            const ChunkFunction function = function_.load(std::memory_order_relaxed);
            void* context = context_.load(std::memory_order_relaxed);
            if (ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel,
                                              std::memory_order_acquire)) {
                try {
                    function(context, static_cast<int>(ticket & 0xffff));
                } catch (...) {
                    // The caller reads it after the last chunk is done, and this one is not yet.
                    if (!failed_.exchange(true)) error_ = std::current_exception();
                }
                num_done_.fetch_add(1, std::memory_order_release);
                ticket = ticket_.load(std::memory_order_acquire);
            }
        }
    }

    [[noreturn]] void serve(int index) {
        for (uint64_t seen = 0;;) {
            seen = wait_for_job(seen);
            if (index < num_helpers_.load(std::memory_order_relaxed)) work();
        }
    }

    uint64_t wait_for_job(uint64_t seen) {
        auto now = std::chrono::steady_clock::now();
        const auto deadline = now + kSpinTime;
        for (auto before = now; now < deadline && now - before < kLongYield; now = std::chrono::steady_clock::now()) {
            for (int i = 0; i < 64; ++i) {
                const uint64_t job = ticket_.load(std::memory_order_acquire) >> 32;
                if (job != seen) return job;
                pause_cpu();
            }
            // Another thread may wait for this core. One that then kept it needs it, and a sleeping worker wakes on a
            // core that is free.
            before = std::chrono::steady_clock::now();
            std::this_thread::yield();
        }
        std::unique_lock<std::mutex> lock(mutex_);
        num_asleep_.fetch_add(1);
        awake_.wait(lock, [&] { return ticket_.load() >> 32 != seen; });
        num_asleep_.fetch_sub(1);
        return ticket_.load() >> 32;
    }

    alignas(64) std::atomic<uint64_t> ticket_{0};
    alignas(64) std::atomic<int> num_done_{0};
    alignas(64) std::atomic<ChunkFunction> function_{nullptr};
    std::atomic<void*> context_{nullptr};
    std::atomic<int> num_helpers_{0};
    std::atomic<int> num_asleep_{0};
    std::atomic<bool> failed_{false};
    std::exception_ptr error_;
    int num_workers_ = 0;  // touched only by the thread that holds the pool
    std::mutex mutex_;
    std::condition_variable awake_;
};

std::atomic<int> wanted_threads{1};
thread_local int num_alone = 0;    // of OneThread, in this thread
thread_local int num_on_team = 0;  // and of OnTeam
std::atomic<const Team*> lent_team{nullptr};
std::atomic<bool> in_use{false};
// Never destroyed: workers may still look at it while the process ends. A forked child leaks its parent's.
std::atomic<Pool*> pool{nullptr};

void forget_pool_in_child() {
    pool.store(nullptr);
    lent_team.store(nullptr);
    in_use.store(false);
}

void watch_forks() {
    static std::atomic<bool> registered{false};
    if (!registered.exchange(true)) pthread_atfork(nullptr, nullptr, forget_pool_in_child);
}

Pool& acquire_pool() {
    Pool* current = pool.load();
    if (current == nullptr) {
        watch_forks();
        current = new Pool;
        pool.store(current);
    }
    return *current;
}

// A job on threads that are not ours.
class TeamJob {
public:
    TeamJob(int num_chunks, ChunkFunction function, void* context)
        : num_chunks_(num_chunks), function_(function), context_(context) {}

    // What the first chunk that threw has thrown, or null.
    std::exception_ptr run(const Team& team, int num_threads) {
        team.run([](void* job) { static_cast<TeamJob*>(job)->work(); }, this, static_cast<unsigned>(num_threads), 0);
        return error_;
    }

private:
    void work() {
        for (int chunk; (chunk = next_.fetch_add(1, std::memory_order_relaxed)) < num_chunks_;) {
            try {
                function_(context_, chunk);
            } catch (...) {
                if (!failed_.exchange(true)) error_ = std::current_exception();
            }
        }
    }

    const int num_chunks_;
    const ChunkFunction function_;
    void* const context_;
    alignas(64) std::atomic<int> next_{0};
    std::atomic<bool> failed_{false};
    std::exception_ptr error_;
};

// Null where jobs of this thread run on the pool: a team of another size would have to be made anew for each.
const Team* team_of(int num_threads) {
    const Team* const team = num_on_team > 0 ? lent_team.load(std::memory_order_acquire) : nullptr;
    return team != nullptr && team->max_threads() == num_threads ? team : nullptr;
}

}  // namespace

void lend_team(const Team& team) {
    watch_forks();
    lent_team.store(new Team(team), std::memory_order_release);
}

OnTeam::OnTeam() { ++num_on_team; }
OnTeam::~OnTeam() { --num_on_team; }

void set_num_threads(int num_threads) { wanted_threads.store(std::clamp(num_threads, 1, kMaxThreads)); }

int num_threads() { return num_alone > 0 ? 1 : wanted_threads.load(std::memory_order_relaxed); }

OneThread::OneThread() { ++num_alone; }
OneThread::~OneThread() { --num_alone; }

void parallel_run(int num_chunks, ChunkFunction function, void* context) {
    const int num_threads = common::num_threads();
    if (num_chunks > 1 && num_chunks <= kMaxChunks && num_threads > 1 &&
        !in_use.exchange(true, std::memory_order_acquire)) {
        std::exception_ptr error;
        if (const Team* const team = team_of(num_threads)) {
            error = TeamJob(num_chunks, function, context).run(*team, num_threads);
        } else {
            Pool& shared = acquire_pool();
            shared.run(num_chunks, num_threads, function, context);
            error = shared.take_error();
        }
        in_use.store(false, std::memory_order_release);
        if (error != nullptr) std::rethrow_exception(error);
        return;
    }
    for (int chunk = 0; chunk < num_chunks; ++chunk) function(context, chunk);
}

double measure_fork_join() {
    constexpr int kRepeats = 2000;
    constexpr auto kPatience = std::chrono::milliseconds(1);  // the system may have refused a thread
    const int num_chunks = num_threads();
    std::vector<double> seconds;
    seconds.reserve(kRepeats);
    for (int repeat = 0; repeat < kRepeats; ++repeat) {
        std::atomic<int> num_arrived{0};
        const auto start = std::chrono::steady_clock::now();
        parallel_for(num_chunks, [&](int) {
            num_arrived.fetch_add(1);
            while (num_arrived.load() < num_chunks && std::chrono::steady_clock::now() - start < kPatience) pause_cpu();
        });
        seconds.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    }
    std::nth_element(seconds.begin(), seconds.begin() + kRepeats / 2, seconds.end());
    return seconds[kRepeats / 2];
}

}  // namespace rarefy::common
