// The thread pool: every chunk runs once, whoever calls, and what a chunk throws arrives; and reads of the bandwidth
// probe. Made to run under sanitizers.
#include <atomic>
#include <chrono>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "common/bandwidth.h"
#include "common/checks.h"
#include "common/pool.h"
#include "common/read_streams.h"

namespace {

using namespace rarefy;
using checks::check;

void test_pool() {
    for (const int num_threads : {1, 2, 5, 2}) {
        common::set_num_threads(num_threads);
        for (int round = 0; round < 2000; ++round) {
            const int num_chunks = round % 40;
            std::vector<int> runs_of_chunk(static_cast<size_t>(num_chunks), 0);
            common::parallel_for(num_chunks, [&](int chunk) { ++runs_of_chunk[static_cast<size_t>(chunk)]; });
            check(runs_of_chunk == std::vector<int>(static_cast<size_t>(num_chunks), 1), "every chunk runs once");
            if (round % 500 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(2));  // let the workers sleep
        }
    }
    std::vector<std::thread> callers;
    std::atomic<int> total{0};
    for (int i = 0; i < 3; ++i) {
        callers.emplace_back([&] {
            for (int round = 0; round < 500; ++round) common::parallel_for(7, [&](int) { ++total; });
        });
    }
    for (std::thread& caller : callers) caller.join();
    check(total == 3 * 500 * 7, "callers that meet each other");
    total = 0;
    common::parallel_for(5, [&](int) { common::parallel_for(6, [&](int) { ++total; }); });
    check(total == 5 * 6, "a job within a job");
    for (int round = 0; round < 100; ++round) {
        total = 0;
        std::string caught;
        try {
            common::parallel_for(20, [&](int chunk) {
                ++total;
                if (chunk % 7 == 3) throw std::runtime_error("chunk");
            });
        } catch (const std::runtime_error& error) {
            caught = error.what();
        }
        check(caught == "chunk" && total == 20, "the others run when chunks throw, and the caller learns of it");
    }
    total = 0;
    common::parallel_for(20, [&](int) { ++total; });
    check(total == 20, "a job after one that threw");
    check(common::measure_fork_join() > 0, "fork and join take time");
}

std::atomic<int> team_size{0}, team_jobs{0};

void run_on_team(void (*function)(void*), void* data, unsigned num_threads, unsigned) {
    ++team_jobs;
    std::vector<std::thread> others;
    for (unsigned i = 1; i < num_threads; ++i) others.emplace_back(function, data);
    function(data);
    for (std::thread& other : others) other.join();
}

void test_team() {
    common::lend_team({run_on_team, [] { return team_size.load(); }});
    for (const int num_threads : {1, 2, 5}) {
        for (const int size : {2, 5}) {
            common::set_num_threads(num_threads);
            team_size = size;
            team_jobs = 0;
            std::atomic<int> total{0};
            common::parallel_for(30, [&](int) { ++total; });
            check(total == 30 && team_jobs == 0, "the pool does what is not meant for the team");
            const common::OnTeam team;
            common::parallel_for(30, [&](int) { common::parallel_for(3, [&](int) { ++total; }); });
            check(total == 120, "every chunk runs once on a team, and what a chunk asks for");
            check(team_jobs == (num_threads == size ? 1 : 0), "a team of another size is left alone");
            int caught = 0;
            try {
                common::parallel_for(20, [&](int chunk) {
                    if (chunk % 7 == 3) throw std::runtime_error("chunk");
                });
            } catch (const std::runtime_error&) {
                ++caught;
            }
            check(caught == 1, "what a chunk throws on a team arrives");
            const common::OneThread alone;
            team_jobs = 0;
            common::parallel_for(4, [&](int) { ++total; });
            check(total == 124 && team_jobs == 0, "a thread that is to work alone does");
        }
    }
}

// Passes of any size stay within the buffer and begin at whole lines, which a load of a line may rely on.
void test_bandwidth() {
    common::set_num_threads(2);
    common::BandwidthProbe probe(int64_t{4} << 20);
    for (const int64_t num_bytes :
         {int64_t{1} << 20, (int64_t{1} << 20) + 1, (int64_t{3} << 20) - 7, probe.num_bytes()})
        for (const int num_streams : {1, 3, common::kMaxStreams})
            for (const int64_t prefetch_bytes : {0, 1024})
                check(probe.read(num_bytes, num_streams, prefetch_bytes).bytes_per_s > 0, "a pass reads all words");
}

}  // namespace

int main() {
    test_pool();
    test_team();
    test_bandwidth();
    return checks::summary();
}
