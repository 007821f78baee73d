// The one thread pool of the process: fork-join with the caller taking part.
//
// parallel_for(num_chunks, body) calls body(chunk) once for every chunk in [0, num_chunks) and returns when all are
// done. Chunks are claimed one by one, so a worker that wakes late costs nothing but its help. Which thread runs a
// chunk is not determined; a body must therefore write only to places that belong to its chunk, and results are then
// the same for every number of threads. If chunks throw, the others still run, and the caller gets the first exception.
//
// Workers look for the next job for a millisecond, unless another thread wants their core, and then sleep, so that they
// do not compete with another pool (torch's, the BLAS's). A call that finds the pool busy, from another thread or from
// within a body, runs all its chunks itself. After fork() the child starts a new pool with its first job. Where the
// system refuses a thread, fewer do the work.
#pragma once

namespace rarefy::common {

// Threads of the next jobs, the caller included; at least 1.
void set_num_threads(int num_threads);
int num_threads();

// While this lives, jobs of its thread run on that thread alone, and num_threads() tells it so: for work that another
// thread would slow down, or that is one of several already.
class OneThread {
public:
    OneThread();
    ~OneThread();
    OneThread(const OneThread&) = delete;
    OneThread& operator=(const OneThread&) = delete;
};

// What OpenMP's runtime offers: GOMP_parallel(function, data, num_threads, flags), omp_get_max_threads().
struct Team {
    void (*run)(void (*function)(void*), void* data, unsigned num_threads, unsigned flags);
    int (*max_threads)();
};
// The runtime of another library in this process, whose threads look for work for milliseconds after their own: beside
// them ours would wait for a core. Lent for ever; a child of fork() forgets it, since the threads are not there.
void lend_team(const Team& team);

// While this lives, jobs of its thread run on the threads of the team, if one is lent and it has as many.
class OnTeam {
public:
    OnTeam();
    ~OnTeam();
    OnTeam(const OnTeam&) = delete;
    OnTeam& operator=(const OnTeam&) = delete;
};

// Median time, in seconds, of a job in which every thread has one chunk that waits for the others to begin theirs.
double measure_fork_join();

using ChunkFunction = void (*)(void* context, int chunk);
void parallel_run(int num_chunks, ChunkFunction function, void* context);

template <class Body>
void parallel_for(int num_chunks, Body&& body) {
    parallel_run(num_chunks, [](void* context, int chunk) { (*static_cast<Body*>(context))(chunk); }, &body);
}

}  // namespace rarefy::common
