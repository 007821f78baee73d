#include "common/memory.h"

#include <pthread.h>
#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>

namespace rarefy::common {
namespace {

constexpr int64_t kPage = 4096;
constexpr int64_t kHugePage = int64_t{2} << 20;
constexpr int64_t kMaxBytes = int64_t{1} << 46;

int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

#if defined(__SANITIZE_ADDRESS__)

constexpr int64_t kSlabBytes = 0;  // every piece alone, on the heap that the sanitizer watches

uint8_t* map(int64_t num_bytes) {
    void* memory = std::aligned_alloc(64, static_cast<size_t>(num_bytes));
    if (memory == nullptr) throw std::bad_alloc();
    std::memset(memory, 0, static_cast<size_t>(num_bytes));
    return static_cast<uint8_t*>(memory);
}
void unmap(uint8_t* memory, int64_t) { std::free(memory); }
void give_back(uint8_t*, int64_t) {}

#else

constexpr int64_t kSlabBytes = 32 * kHugePage;

// Aligned to a huge page, so that whole ones fit. The system has cleared it.
uint8_t* map(int64_t num_bytes) {
    const auto size = static_cast<uintptr_t>(num_bytes), page = static_cast<uintptr_t>(kHugePage);
    void* memory = mmap(nullptr, size + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    const auto found = reinterpret_cast<uintptr_t>(memory), wanted = (found + page - 1) / page * page;
    if (wanted > found) munmap(memory, wanted - found);
    if (found + page > wanted) munmap(reinterpret_cast<void*>(wanted + size), found + page - wanted);
#ifdef MADV_HUGEPAGE
    madvise(reinterpret_cast<void*>(wanted), size, MADV_HUGEPAGE);  // refused: small pages do as well
#endif
    return reinterpret_cast<uint8_t*>(wanted);
}
void unmap(uint8_t* memory, int64_t num_bytes) { munmap(memory, static_cast<size_t>(num_bytes)); }

// The pages that lie in these bytes alone; nobody may read them again.
void give_back(uint8_t* memory, int64_t num_bytes) {
    const auto page = static_cast<uintptr_t>(kPage), begin = reinterpret_cast<uintptr_t>(memory);
    const uintptr_t first = (begin + page - 1) / page * page,
                    last = (begin + static_cast<uintptr_t>(num_bytes)) / page * page;
    if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED);
}

#endif

// Held while the process forks, so that no child is born with it locked.
std::mutex mutex;
void lock() { mutex.lock(); }
void unlock() { mutex.unlock(); }

}  // namespace

// A mapping that hands out its bytes from the first to the last, once.
class Slab {
public:
    explicit Slab(int64_t num_bytes) : memory_(map(num_bytes)), size_(num_bytes) {}
    ~Slab() { unmap(memory_, size_); }
    Slab(const Slab&) = delete;
    Slab& operator=(const Slab&) = delete;

    int64_t left() const { return size_ - used_; }

    // The next `num_bytes`, or null where fewer are left.
    uint8_t* take(int64_t num_bytes) {
        if (left() < num_bytes) return nullptr;
        used_ += num_bytes;
        return memory_ + used_ - num_bytes;
    }

private:
    uint8_t* memory_;
    int64_t size_, used_ = 0;
};

void ReleaseSlab::operator()(uint8_t* bytes) const { give_back(bytes, num_bytes); }

AlignedBytes allocate_aligned(int64_t num_bytes) {
    if (num_bytes > kMaxBytes) throw std::bad_alloc();
    const int64_t size = round_up(num_bytes > 0 ? num_bytes : 1, 64);
    static std::weak_ptr<Slab> current;
    static const int registered = pthread_atfork(lock, unlock, unlock);
    static_cast<void>(registered);
    const std::lock_guard<std::mutex> guard(mutex);
    std::shared_ptr<Slab> slab = current.lock();
    uint8_t* bytes = slab ? slab->take(size) : nullptr;
    if (bytes == nullptr) {
        const int64_t left = slab ? slab->left() : -1;
        // A large piece has whole huge pages, and shares the last of them with what comes next.
        const int64_t own = round_up(size, kSlabBytes > 0 ? kHugePage : 64);
        slab = std::make_shared<Slab>(own > kSlabBytes / 4 ? own : kSlabBytes);
        bytes = slab->take(size);
        if (slab->left() > left) current = slab;
    }
    return AlignedBytes(bytes, {slab, size});
}

}  // namespace rarefy::common
