// The arithmetic on blocks, compiled once for any CPU and once for AVX-512. The file that includes it defines
// RAREFY_FISHER_TABLE, the name of the table. Blocks of 16, oBERT's default, have loops of fixed length.
#include <cstdint>
#include <cstring>

#include "fisher/fisher.h"

namespace rarefy::fisher {
namespace {

constexpr int kUsual = 16;
// Wider blocks are worked on fewer at a time, for the cache's sake.
constexpr int kWide = 128;

inline void widen(const float* from, int size, float* to) {
    for (int i = 0; i < size; ++i) to[i] = from[i];
}

inline void widen(const uint16_t* from, int size, float* to) {
    for (int i = 0; i < size; ++i) {
        const uint32_t word = uint32_t{from[i]} << 16;
        std::memcpy(to + i, &word, sizeof word);
    }
}

template <class Number>
void add(const Number* const* x, int64_t num_rows, int64_t first, int64_t num_blocks, int size, float* total) {
    float vector[kMostSize];
    for (int64_t b = 0; b < num_blocks; ++b, first += size, total += triangle(size)) {
        for (int64_t n = 0; n < num_rows; ++n) {
            widen(x[n] + first, size, vector);
            for (int i = 0; i < size; ++i) {
                float* row = total + triangle(i);
                for (int j = 0; j <= i; ++j) row[j] += vector[i] * vector[j];
            }
        }
    }
}

// The sums of a block of 16 stay in registers, each row in one of 16 numbers: those behind its own are of rows below,
// which are stored after it.
template <class Number>
void add_usual(const Number* const* x, int64_t num_rows, int64_t first, int64_t num_blocks, float* total) {
    typedef float Vector __attribute__((vector_size(4 * kUsual)));
    for (int64_t b = 0; b < num_blocks; ++b, first += kUsual, total += triangle(kUsual)) {
        Vector sum[kUsual];
#pragma GCC unroll 16
        for (int i = 0; i < kUsual; ++i) std::memcpy(&sum[i], total + triangle(i), sizeof sum[i]);
        for (int64_t n = 0; n < num_rows; ++n) {
            float numbers[kUsual];
            widen(x[n] + first, kUsual, numbers);
            Vector vector;
            std::memcpy(&vector, numbers, sizeof vector);
#pragma GCC unroll 16
            for (int i = 0; i < kUsual; ++i) sum[i] += vector * numbers[i];
        }
#pragma GCC unroll 16
        for (int i = 0; i < kUsual; ++i) std::memcpy(total + triangle(i), &sum[i], sizeof sum[i]);
    }
}

template <class Number>
void add_any(const Number* const* x, int64_t num_rows, int64_t first, int64_t num_blocks, int size, float* total) {
    if (size == kUsual)
        add_usual(x, num_rows, first, num_blocks, total);
    else
        add(x, num_rows, first, num_blocks, size, total);
}

// As many numbers as there are blocks worked on at once, one of each.
template <class Number, int kLanes>
using Lanes [[gnu::vector_size(sizeof(Number) * kLanes)]] = Number;

// Symmetric elimination without a choice of pivots (the sweep operator) on the lower triangles of kLanes blocks; where
// there are fewer, the last one stands in for the rest. `a` has room for a triangle of lanes.
template <int kLanes, class Size>
void invert_some(const float* block, int count, Size size, double scale, double damp, Lanes<double, kLanes>* a,
                 float* inverse) {
    Lanes<double, kLanes> column[kMostSize];
    for (int lane = 0; lane < kLanes; ++lane) {
        const float* own = block + (lane < count ? lane : count - 1) * triangle(size);
        for (int i = 0; i < triangle(size); ++i) a[i][lane] = own[i];
    }
    for (int i = 0; i < triangle(size); ++i) a[i] /= scale;
    for (int i = 0; i < size; ++i) a[triangle(i) + i] += damp;
    for (int k = 0; k < size; ++k) {
        const Lanes<double, kLanes> pivot = 1 / a[triangle(k) + k];
        for (int j = 0; j < k; ++j) column[j] = a[triangle(k) + j];
        for (int i = k + 1; i < size; ++i) column[i] = a[triangle(i) + k];
        column[k] = Lanes<double, kLanes>{};
        for (int i = 0; i < size; ++i) {
            const Lanes<double, kLanes> factor = column[i] * pivot;
            for (int j = 0; j <= i; ++j) a[triangle(i) + j] -= factor * column[j];
        }
        for (int j = 0; j < k; ++j) a[triangle(k) + j] = column[j] * pivot;
        for (int i = k + 1; i < size; ++i) a[triangle(i) + k] = column[i] * pivot;
        a[triangle(k) + k] = -pivot;
    }
    for (int lane = 0; lane < count; ++lane, inverse += size * size)
        for (int i = 0; i < size; ++i)
            for (int j = 0; j <= i; ++j)
                inverse[i * size + j] = inverse[j * size + i] = static_cast<float>(-a[triangle(i) + j][lane]);
}

// Less than this of a diagonal is rounding; more than that of a cost is infinite.
constexpr float kLeast = 1e-30f, kMost = 3.4028234663852886e38f, kInfinity = __builtin_inff();

// On the lower triangles of kLanes blocks, see `invert_some`.
template <int kLanes, class Size>
void costs_of_some(const float* weight, const float* inverse, const uint8_t* free, int count, Size size,
                   Lanes<float, kLanes>* a, float* cost) {
    using Floats = Lanes<float, kLanes>;
    using Places = Lanes<int32_t, kLanes>;
    Floats moving[kMostSize], column[kMostSize], paid[kMostSize];
    Places left[kMostSize];
    for (int lane = 0; lane < kLanes; ++lane) {
        const int64_t own = lane < count ? lane : count - 1;
        for (int i = 0; i < size; ++i) {
            moving[i][lane] = weight[own * size + i];
            left[i][lane] = free[own * size + i] != 0 ? -1 : 0;
            paid[i][lane] = 0;
            for (int j = 0; j <= i; ++j) a[triangle(i) + j][lane] = inverse[(own * size + i) * size + j];
        }
    }
    for (int i = 0; i < size; ++i) column[i] = Floats{};
    Floats most{};
    for (int step = 0; step < size; ++step) {
        Floats least = Floats{} + kInfinity;
        Places place{};
        for (int i = 0; i < size; ++i) {
            const Floats diagonal = a[triangle(i) + i];
            const Floats each = moving[i] * moving[i] / (diagonal > kLeast ? diagonal : Floats{} + kLeast);
            const Floats price = left[i] ? (each < kMost ? each : Floats{} + kMost) : Floats{} + kInfinity;
            place = price < least ? Places{} + i : place;
            least = price < least ? price : least;
        }
        const Places any = least < kInfinity;
        most = any && least > most ? least : most;
        Floats moved{}, pivot = Floats{} + 1;
        bool found = false;
        for (int lane = 0; lane < kLanes; ++lane) {
            if (any[lane] == 0) continue;
            const int k = place[lane];
            for (int j = 0; j < k; ++j) column[j][lane] = a[triangle(k) + j][lane];
            for (int i = k; i < size; ++i) column[i][lane] = a[triangle(i) + k][lane];
            pivot[lane] = column[k][lane];
            moved[lane] = moving[k][lane];
            paid[k][lane] = most[lane];
            left[k][lane] = 0;
            found = true;
        }
        if (!found) break;
        const Floats reciprocal = any ? 1 / pivot : Floats{};
        for (int i = 0; i < size; ++i) {
            const Floats factor = column[i] * reciprocal;
            moving[i] -= factor * moved;
            for (int j = 0; j <= i; ++j) a[triangle(i) + j] -= factor * column[j];
        }
    }
    for (int lane = 0; lane < count; ++lane)
        for (int i = 0; i < size; ++i) cost[lane * size + i] = paid[i][lane];
}

template <class Size>
void drop_from_one(const uint8_t* drop, Size size, double* a, float* weight, float* inverse) {
    double row[kMostSize], wide[kMostSize];
    for (int i = 0; i < size * size; ++i) a[i] = inverse[i];
    for (int i = 0; i < size; ++i) wide[i] = weight[i];
    for (int k = 0; k < size; ++k) {
        if (!drop[k]) continue;
        const double price = 1 / a[k * size + k], moved = wide[k];
        for (int j = 0; j < size; ++j) row[j] = a[k * size + j];
        for (int i = 0; i < size; ++i) wide[i] -= a[i * size + k] * price * moved;
        for (int i = 0; i < size; ++i) {
            const double factor = a[i * size + k] * price;
            for (int j = 0; j < size; ++j) a[i * size + j] -= factor * row[j];
        }
    }
    for (int i = 0; i < size * size; ++i) inverse[i] = static_cast<float>(a[i]);
    for (int i = 0; i < size; ++i) weight[i] = drop[i] ? 0 : static_cast<float>(wide[i]);
}

// A size that the compiler knows.
struct Usual {
    constexpr operator int() const { return kUsual; }
};

// Memory for one block, on the stack where it is small.
template <class Number>
struct Room {
    explicit Room(int size) : numbers(size <= 32 ? here : new Number[static_cast<size_t>(size) * size]) {}
    ~Room() {
        if (numbers != here) delete[] numbers;
    }
    Room(const Room&) = delete;
    Room& operator=(const Room&) = delete;
    Number here[32 * 32];
    Number* numbers;
};

template <int kLanes, class Size>
void invert(const float* block, int64_t num_blocks, Size size, double scale, double damp, float* inverse) {
    Room<Lanes<double, kLanes>> room(size);
    for (int64_t b = 0; b < num_blocks; b += kLanes) {
        const int count = static_cast<int>(num_blocks - b < kLanes ? num_blocks - b : kLanes);
        invert_some<kLanes>(block + b * triangle(size), count, size, scale, damp, room.numbers,
                            inverse + b * size * size);
    }
}

template <int kLanes, class Size>
void costs(const float* weight, const float* inverse, const uint8_t* free, int64_t num_blocks, Size size, float* cost) {
    Room<Lanes<float, kLanes>> room(size);
    for (int64_t b = 0; b < num_blocks; b += kLanes) {
        const int count = static_cast<int>(num_blocks - b < kLanes ? num_blocks - b : kLanes);
        costs_of_some<kLanes>(weight + b * size, inverse + b * size * size, free + b * size, count, size, room.numbers,
                              cost + b * size);
    }
}

template <class Size>
void drop(const uint8_t* dropped, int64_t num_blocks, Size size, float* weight, float* inverse) {
    Room<double> room(size);
    for (int64_t b = 0; b < num_blocks; ++b)
        drop_from_one(dropped + b * size, size, room.numbers, weight + b * size, inverse + b * size * size);
}

}  // namespace

const Functions RAREFY_FISHER_TABLE = {
    add_any<uint16_t>,
    add_any<float>,
    [](const float* block, int64_t num_blocks, int size, double scale, double damp, float* inverse) {
        if (size == kUsual)
            invert<8>(block, num_blocks, Usual{}, scale, damp, inverse);
        else
            (size <= kWide ? invert<8, int> : invert<2, int>)(block, num_blocks, size, scale, damp, inverse);
    },
    [](const float* weight, const float* inverse, const uint8_t* free, int64_t num_blocks, int size, float* cost) {
        if (size == kUsual)
            costs<16>(weight, inverse, free, num_blocks, Usual{}, cost);
        else
            (size <= kWide ? costs<16, int> : costs<4, int>)(weight, inverse, free, num_blocks, size, cost);
    },
    [](const uint8_t* dropped, int64_t num_blocks, int size, float* weight, float* inverse) {
        if (size == kUsual)
            drop(dropped, num_blocks, Usual{}, weight, inverse);
        else
            drop(dropped, num_blocks, size, weight, inverse);
    },
};

}  // namespace rarefy::fisher
