#include "common/recycled.h"

#include <pthread.h>
#include <sys/mman.h>

#include <cstddef>
#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

namespace rarefy::common {
namespace {

constexpr int64_t kHugePage = int64_t{2} << 20;

struct Piece {
    uint8_t* bytes;
    int64_t num_bytes;
};

// Leaked: arrays may die after it would have. Held while the process forks, so that no child is born with it locked.
struct Waiting {
    std::mutex mutex;
    std::vector<Piece> pieces;  // the newest last
    int64_t num_bytes = 0;
};

Waiting& waiting() {
    static Waiting* const all = [] {
        auto* made = new Waiting;
        pthread_atfork([] { waiting().mutex.lock(); }, [] { waiting().mutex.unlock(); },
                       [] { waiting().mutex.unlock(); });
        return made;
    }();
    return *all;
}

// Pieces of few sizes, so that one fits the next: large ones are whole huge pages.
int64_t round_size(int64_t num_bytes) {
    const int64_t multiple = num_bytes >= kHugePage / 2 ? kHugePage : int64_t{16} << 10;
    return (num_bytes / multiple + (num_bytes % multiple != 0)) * multiple;
}

// Mapped, because what malloc gets back in the midst of its heap it keeps. Null where there is no memory.
uint8_t* map_huge_pages(int64_t size) {
    const auto num_mapped = static_cast<size_t>(size + kHugePage);
    void* const mapped = mmap(nullptr, num_mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) return nullptr;
    auto* const begin = static_cast<uint8_t*>(mapped);
    const auto before = static_cast<size_t>(-reinterpret_cast<uintptr_t>(mapped) & (kHugePage - 1));
    const size_t after = num_mapped - before - static_cast<size_t>(size);
    if (before > 0) munmap(begin, before);
    if (after > 0) munmap(begin + before + size, after);
#ifdef MADV_HUGEPAGE
    madvise(begin + before, static_cast<size_t>(size), MADV_HUGEPAGE);  // refused: small pages do
#endif
    return begin + before;
}

uint8_t* allocate_small(int64_t size) {
    return static_cast<uint8_t*>(std::aligned_alloc(64, static_cast<size_t>(size)));
}

}  // namespace

RecycledBytes allocate_recycled(int64_t num_bytes) {
    const int64_t size = round_size(num_bytes > 0 ? num_bytes : 1);
    {
        Waiting& all = waiting();
        const std::lock_guard<std::mutex> guard(all.mutex);
        for (size_t i = all.pieces.size(); i-- > 0;) {
            if (all.pieces[i].num_bytes != size) continue;
            uint8_t* const bytes = all.pieces[i].bytes;
            all.pieces.erase(all.pieces.begin() + static_cast<std::ptrdiff_t>(i));
            all.num_bytes -= size;
            return RecycledBytes(bytes, {size});
        }
    }
    uint8_t* const bytes = size % kHugePage == 0 ? map_huge_pages(size) : allocate_small(size);
    if (bytes == nullptr) throw std::bad_alloc();
    return RecycledBytes(bytes, {size});
}

void Recycle::operator()(uint8_t* bytes) const {
    std::vector<Piece> old;
    {
        Waiting& all = waiting();
        const std::lock_guard<std::mutex> guard(all.mutex);
        all.pieces.push_back({bytes, num_bytes});
        all.num_bytes += num_bytes;
        size_t count = 0;
        for (; all.num_bytes > kMaxWaitingBytes; ++count) all.num_bytes -= all.pieces[count].num_bytes;
        const auto end = all.pieces.begin() + static_cast<std::ptrdiff_t>(count);
        old.assign(all.pieces.begin(), end);
        all.pieces.erase(all.pieces.begin(), end);
    }
    for (const Piece& piece : old) {
        if (piece.num_bytes % kHugePage == 0)
            munmap(piece.bytes, static_cast<size_t>(piece.num_bytes));
        else
            std::free(piece.bytes);
    }
}

int64_t waiting_bytes() {
    Waiting& all = waiting();
    const std::lock_guard<std::mutex> guard(all.mutex);
    return all.num_bytes;
}

}  // namespace rarefy::common
