// Sums of outer products, inverses, costs and drops against plain loops in double precision that solve linear systems
// anew at every step; made to run under sanitizers.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <utility>
#include <vector>

#include "common/cpu.h"
#include "fisher/fisher.h"

namespace {

using namespace rarefy::fisher;
using Matrix = std::vector<double>;

// Of a symmetric positive definite matrix, by elimination with the rows chosen by size.
Matrix inverse_of(Matrix a, int size) {
    Matrix inverse(a.size(), 0.0);
    for (int i = 0; i < size; ++i) inverse[i * size + i] = 1;
    for (int k = 0; k < size; ++k) {
        int best = k;
        for (int i = k + 1; i < size; ++i)
            if (std::fabs(a[i * size + k]) > std::fabs(a[best * size + k])) best = i;
        for (int j = 0; j < size; ++j) {
            std::swap(a[k * size + j], a[best * size + j]);
            std::swap(inverse[k * size + j], inverse[best * size + j]);
        }
        const double pivot = a[k * size + k];
        for (int j = 0; j < size; ++j) {
            a[k * size + j] /= pivot;
            inverse[k * size + j] /= pivot;
        }
        for (int i = 0; i < size; ++i) {
            if (i == k) continue;
            const double factor = a[i * size + k];
            for (int j = 0; j < size; ++j) {
                a[i * size + j] -= factor * a[k * size + j];
                inverse[i * size + j] -= factor * inverse[k * size + j];
            }
        }
    }
    return inverse;
}

// Optimal brain surgery without updates: what is left of a block once `gone` are zero, from the block itself. The
// weights that stay minimise the quadratic form of `block` around `weight`; their inverse is that of the rows and
// columns that stay.
void without(const Matrix& block, const std::vector<bool>& gone, int size, Matrix& weight, Matrix& inverse) {
    std::vector<int> kept;
    for (int i = 0; i < size; ++i)
        if (!gone[i]) kept.push_back(i);
    const auto count = static_cast<int>(kept.size());
    Matrix part(kept.size() * kept.size());
    for (int i = 0; i < count; ++i)
        for (int j = 0; j < count; ++j) part[i * count + j] = block[kept[i] * size + kept[j]];
    part = inverse_of(part, count);
    Matrix moved(weight.size(), 0.0);
    inverse.assign(block.size(), 0.0);
    for (int i = 0; i < count; ++i) {
        moved[kept[i]] = weight[kept[i]];
        for (int j = 0; j < count; ++j) {
            inverse[kept[i] * size + kept[j]] = part[i * count + j];
            for (int k = 0; k < size; ++k)
                if (gone[k]) moved[kept[i]] += part[i * count + j] * block[kept[j] * size + k] * weight[k];
        }
    }
    weight = moved;
}

int failed = 0, passed = 0;

void expect(bool right, const char* what, const char* isa, int size, int64_t num_blocks) {
    (right ? passed : failed) += 1;
    if (!right) std::printf("%s on %s, %d blocks of %d: wrong\n", what, isa, static_cast<int>(num_blocks), size);
}

bool near(double got, double expected, double scale) { return std::fabs(got - expected) <= 2e-4 * scale; }

float bf16(float value, uint16_t& bits) {
    uint32_t word;
    std::memcpy(&word, &value, sizeof word);
    bits = static_cast<uint16_t>(word >> 16);
    word = uint32_t{bits} << 16;
    std::memcpy(&value, &word, sizeof value);
    return value;
}

// Every array has exactly as many numbers as the contract says, so that a sanitizer sees any access beyond.
void check(const Functions& functions, const char* isa, int size, int64_t num_blocks) {
    std::mt19937 random(static_cast<unsigned>(size * 100 + num_blocks));
    std::normal_distribution<float> normal;
    const int64_t num_rows = 2 * size + 3, width = num_blocks * size, square = int64_t{size} * size;
    std::vector<std::vector<float>> rows(num_rows, std::vector<float>(width));
    std::vector<std::vector<uint16_t>> bits(num_rows, std::vector<uint16_t>(width));
    std::vector<const float*> floats;
    std::vector<const uint16_t*> words;
    for (int64_t n = 0; n < num_rows; ++n) {
        for (int64_t i = 0; i < width; ++i) rows[n][i] = bf16(normal(random), bits[n][i]);
        floats.push_back(rows[n].data());
        words.push_back(bits[n].data());
    }
    std::vector<float> total(num_blocks * triangle(size), 1.0f), of_words = total;
    functions.add_float(floats.data(), num_rows, 0, num_blocks, size, total.data());
    functions.add_bf16(words.data(), num_rows, 0, num_blocks, size, of_words.data());
    bool sums = true;
    for (int64_t b = 0; b < num_blocks; ++b) {
        for (int i = 0; i < size; ++i) {
            for (int j = 0; j <= i; ++j) {
                double sum = 1, scale = 1;
                for (int64_t n = 0; n < num_rows; ++n) {
                    const double product = double{rows[n][b * size + i]} * rows[n][b * size + j];
                    sum += product;
                    scale += std::fabs(product);
                }
                const int64_t at = b * triangle(size) + triangle(i) + j;
                sums &= near(total[at], sum, 0.1 * scale) && near(of_words[at], sum, 0.1 * scale);
            }
        }
    }
    expect(sums, "sums", isa, size, num_blocks);

    std::vector<float> inverse(num_blocks * square);
    functions.invert(total.data(), num_blocks, size, double(num_rows), 0.1, inverse.data());
    std::vector<float> weight(width), cost(width);
    std::vector<uint8_t> free(width), drop(width);
    for (int64_t i = 0; i < width; ++i) {
        weight[i] = normal(random);
        free[i] = random() % 4 != 0;
        drop[i] = random() % 2 == 0;
    }
    functions.costs(weight.data(), inverse.data(), free.data(), num_blocks, size, cost.data());
    std::vector<float> left = weight, reduced = inverse;
    functions.drop(drop.data(), num_blocks, size, left.data(), reduced.data());
    bool inverses = true, costs = true, drops = true;
    for (int64_t b = 0; b < num_blocks; ++b) {
        Matrix block(square);
        for (int i = 0; i < size; ++i)
            for (int j = 0; j < size; ++j)
                block[i * size + j] =
                    total[b * triangle(size) + triangle(i > j ? i : j) + (i > j ? j : i)] / double(num_rows) +
                    (i == j ? 0.1 : 0);
        Matrix expected = inverse_of(block, size);
        double largest = 0;
        for (const double value : expected) largest = std::fmax(largest, std::fabs(value));
        for (int64_t i = 0; i < square; ++i) inverses &= near(inverse[b * square + i], expected[i], largest);

        const Matrix before(weight.begin() + b * size, weight.begin() + (b + 1) * size);
        std::vector<bool> gone(size), chosen(size);
        Matrix moving = before;
        double most = 0;
        for (int i = 0; i < size; ++i) costs &= free[b * size + i] != 0 || cost[b * size + i] == 0;
        for (;;) {
            // The order is the kernel's where two prices are nearly alike: the entry whose cost it gives is next.
            int cheapest = -1;
            double least = 0;
            for (int i = 0; i < size; ++i) {
                if (gone[i] || free[b * size + i] == 0) continue;
                const double price = moving[i] * moving[i] / expected[i * size + i];
                if (cheapest < 0 || price < least) cheapest = i, least = price;
            }
            if (cheapest < 0) break;
            most = std::fmax(most, least);
            costs &= std::fabs(cost[b * size + cheapest] - most) <= 2e-3 * most + 1e-6;
            gone[cheapest] = true;
            moving = before;
            without(block, gone, size, moving, expected);
        }

        for (int i = 0; i < size; ++i) chosen[i] = drop[b * size + i] != 0;
        moving = before;
        without(block, chosen, size, moving, expected);
        for (int i = 0; i < size; ++i) {
            drops &= chosen[i] ? left[b * size + i] == 0 : near(left[b * size + i], moving[i], 10);
            for (int j = 0; j < size; ++j)
                drops &= near(reduced[b * square + i * size + j], expected[i * size + j], largest);
        }
    }
    expect(inverses, "inverses", isa, size, num_blocks);
    expect(costs, "costs", isa, size, num_blocks);
    expect(drops, "drops", isa, size, num_blocks);
}

void check_all(const Functions& functions, const char* isa) {
    for (const int size : {1, 2, 3, 7, 15, 16, 17, 32, 33, 40})
        for (const int64_t num_blocks : {0, 1, 3, 8, 17}) check(functions, isa, size, num_blocks);
    check(functions, isa, 129, 1);
}

}  // namespace

int main() {
    check_all(reference, "reference");
#if RAREFY_X86
    if (rarefy::common::can_run_avx512(rarefy::common::detect_cpu())) check_all(wide, "avx512");
#endif
    std::printf("%d passed, %d failed\n", passed, failed);
    return failed == 0 ? 0 : 1;
}
