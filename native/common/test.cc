// The thread pool: every chunk runs once, whoever calls, and what a chunk throws arrives; made to run under sanitizers.
#include <atomic>
#include <chrono>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "common/checks.h"
#include "common/pool.h"

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

}  // namespace

int main() {
    test_pool();
    return checks::summary();
}
