// The arithmetic on blocks, compiled once for any CPU and once for AVX-512. The file that includes it defines
// RAREFY_FISHER_TABLE, the name of the table. Blocks of 16, oBERT's default, have loops of fixed length.
#include <cstdint>
#include <cstring>

#include "fisher/fisher.h"

namespace rarefy::fisher {
namespace {

constexpr int kUsual = 16;

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

// Gauss-Jordan elimination without a choice of pivots. `a` has room for size * size numbers.
template <class Size>
void invert_one(const float* block, Size size, double scale, double damp, double* a, float* inverse) {
    double row[kMostSize], column[kMostSize];
    for (int i = 0; i < size; ++i)
        for (int j = 0; j <= i; ++j) a[i * size + j] = a[j * size + i] = *block++ / scale;
    for (int i = 0; i < size; ++i) a[i * size + i] += damp;
    for (int k = 0; k < size; ++k) {
        const double pivot = 1 / a[k * size + k];
        for (int j = 0; j < size; ++j) row[j] = a[k * size + j] * pivot;
        for (int i = 0; i < size; ++i) column[i] = a[i * size + k];
        for (int i = 0; i < size; ++i) {
            const double factor = column[i];
            for (int j = 0; j < size; ++j) a[i * size + j] -= factor * row[j];
        }
        for (int j = 0; j < size; ++j) a[k * size + j] = row[j];
        for (int i = 0; i < size; ++i) a[i * size + k] = -column[i] * pivot;
        a[k * size + k] = pivot;
    }
    for (int i = 0; i < size * size; ++i) inverse[i] = static_cast<float>(a[i]);
}

// Less than this of a diagonal is rounding; more than that of a cost is infinite.
constexpr float kLeast = 1e-30f, kMost = 3.4028234663852886e38f, kInfinity = __builtin_inff();

template <class Size>
void costs_of_one(float* weight, float* inverse, const uint8_t* free, Size size, float* cost) {
    float column[kMostSize], diagonal[kMostSize], price[kMostSize];
    int left[kMostSize];
    float most = 0;
    for (int i = 0; i < size; ++i) left[i] = free[i] != 0, cost[i] = 0, diagonal[i] = inverse[i * size + i];
    for (int step = 0; step < size; ++step) {
        for (int i = 0; i < size; ++i) {
            const float each = weight[i] * weight[i] / (diagonal[i] > kLeast ? diagonal[i] : kLeast);
            price[i] = left[i] ? (each < kMost ? each : kMost) : kInfinity;
        }
        int place = 0;
        float least = price[0];
        for (int i = 1; i < size; ++i)
            if (price[i] < least) place = i, least = price[i];
        if (!(least < kInfinity)) return;
        most = least > most ? least : most;
        cost[place] = most;
        left[place] = 0;
        for (int i = 0; i < size; ++i) column[i] = inverse[place * size + i];
        const float reciprocal = 1 / column[place], moved = weight[place];
        for (int i = 0; i < size; ++i) {
            const float factor = column[i] * reciprocal;
            weight[i] -= factor * moved;
            for (int j = 0; j < size; ++j) inverse[i * size + j] -= factor * column[j];
            diagonal[i] -= factor * column[i];
        }
    }
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

template <class Size>
void invert(const float* block, int64_t num_blocks, Size size, double scale, double damp, float* inverse) {
    Room<double> room(size);
    for (int64_t b = 0; b < num_blocks; ++b)
        invert_one(block + b * triangle(size), size, scale, damp, room.numbers, inverse + b * size * size);
}

template <class Size>
void costs(const float* weight, const float* inverse, const uint8_t* free, int64_t num_blocks, Size size, float* cost) {
    Room<float> room(size);
    float own[kMostSize];
    for (int64_t b = 0; b < num_blocks; ++b) {
        std::memcpy(own, weight + b * size, sizeof(float) * static_cast<size_t>(size));
        std::memcpy(room.numbers, inverse + b * size * size, sizeof(float) * static_cast<size_t>(size) * size);
        costs_of_one(own, room.numbers, free + b * size, size, cost + b * size);
    }
}

template <class Size>
void drop(const uint8_t* dropped, int64_t num_blocks, Size size, float* weight, float* inverse) {
    Room<double> room(size);
    for (int64_t b = 0; b < num_blocks; ++b)
        drop_from_one(dropped + b * size, size, room.numbers, weight + b * size, inverse + b * size * size);
}

}  // namespace

extern const Functions RAREFY_FISHER_TABLE;
const Functions RAREFY_FISHER_TABLE = {
    add_any<uint16_t>,
    add_any<float>,
    [](const float* block, int64_t num_blocks, int size, double scale, double damp, float* inverse) {
        if (size == kUsual)
            invert(block, num_blocks, Usual{}, scale, damp, inverse);
        else
            invert(block, num_blocks, size, scale, damp, inverse);
    },
    [](const float* weight, const float* inverse, const uint8_t* free, int64_t num_blocks, int size, float* cost) {
        if (size == kUsual)
            costs(weight, inverse, free, num_blocks, Usual{}, cost);
        else
            costs(weight, inverse, free, num_blocks, size, cost);
    },
    [](const uint8_t* dropped, int64_t num_blocks, int size, float* weight, float* inverse) {
        if (size == kUsual)
            drop(dropped, num_blocks, Usual{}, weight, inverse);
        else
            drop(dropped, num_blocks, size, weight, inverse);
    },
};

}  // namespace rarefy::fisher
