// What the fuzz programs share: numbers drawn out of the fuzzer's bytes, memory of exactly the right size, and a main
// function for compilers without libFuzzer.
//
// A fuzz program, native/<op>/fuzz.cc, defines LLVMFuzzerTestOneInput. It is built with the other programs (option
// RAREFY_BUILD_TESTS). With clang and RAREFY_SANITIZE=fuzzer,address,undefined libFuzzer drives it. Otherwise it feeds
// itself: <op>_fuzz [--seconds N] [--runs N] [--seed N] [--first N]; input `first + i` of a seed is always the same.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <random>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace rarefy::fuzz {

// Decisions and sizes come from the bytes of the input, zeros after its end; bulk data from a generator they seed.
class Input {
public:
    Input(const uint8_t* data, size_t size) : data_(data), left_(size) {}

    uint64_t bits(int num_bytes) {
        uint64_t value = 0;
        for (int i = 0; i < num_bytes && left_ > 0; ++i, --left_) value |= uint64_t{*data_++} << (8 * i);
        return value;
    }
    // In [low, high].
    int64_t between(int64_t low, int64_t high) {
        return low + static_cast<int64_t>(bits(4) % static_cast<uint64_t>(high - low + 1));
    }
    bool one_in(int count) { return between(0, count - 1) == 0; }
    template <class T>
    T pick(std::initializer_list<T> values) {
        return values.begin()[bits(2) % values.size()];
    }
    // A size up to `high`, often one where something ends.
    int64_t size(int64_t high) {
        const int64_t base =
            pick<int64_t>({0, 1, 4, 5, 15, 16, 31, 32, 48, 63, 64, 96, 128, 192, 256}) + pick<int64_t>({-1, 0, 0, 1});
        const int64_t value = one_in(2) ? between(0, high) : base;
        return value < 0 ? 0 : value > high ? high : value;
    }

private:
    const uint8_t* data_;
    size_t left_;
};

// A copy that ends where its memory ends, so that the sanitizer sees any access beyond; `shift` bytes off alignment.
template <class T>
class Exact {
public:
    explicit Exact(size_t count, size_t shift = 0)
        : memory_(new uint8_t[count * sizeof(T) + shift]), data_(reinterpret_cast<T*>(memory_.get() + shift)) {}
    Exact(const std::vector<T>& values, size_t shift = 0) : Exact(values.size(), shift) {
        if (!values.empty()) std::memcpy(memory_.get() + shift, values.data(), values.size() * sizeof(T));
    }
    T* data() const { return data_; }

private:
    std::unique_ptr<uint8_t[]> memory_;
    T* data_;
};

// `count` floats, most of them usual, some zero, tiny, huge or (where wanted) not finite.
inline std::vector<float> floats(Input& input, int64_t count, bool finite) {
    std::mt19937 random(static_cast<unsigned>(input.bits(4)));
    const bool strange = input.one_in(4);
    std::vector<float> values(static_cast<size_t>(count));
    for (float& value : values) {
        value = static_cast<float>(static_cast<int32_t>(random())) * 0x1p-30f;
        if (!strange || random() % 64 != 0) continue;
        const float kinds[] = {
            0.0f, -0.0f, 1e-42f, -3e38f, 1e30f, __builtin_inff(), -__builtin_inff(), __builtin_nanf("")};
        value = kinds[random() % (finite ? 5 : 8)];
    }
    return values;
}

[[noreturn]] inline void fail(const std::string& what) {
    std::fprintf(stderr, "FAILED: %s\n", what.c_str());
    std::abort();
}

#if !defined(RAREFY_LIBFUZZER)

inline unsigned long long seed = 1, run = 0;

inline void say_where() { std::fprintf(stderr, "repeat with --seed %llu --first %llu --runs 1\n", seed, run); }

inline int drive(int argc, char** argv) {
    double seconds = 60;
    unsigned long long runs = ~0ull;
    for (int i = 1; i < argc; i += 2) {
        const std::string name = argv[i];
        const char* const value = i + 1 < argc ? argv[i + 1] : "";
        char* end = nullptr;
        const unsigned long long number = std::strtoull(value, &end, 10);
        if (*value < '0' || *value > '9' || *end != 0) end = nullptr;  // it would take a sign too
        if (end != nullptr && name == "--seconds") {
            seconds = static_cast<double>(number);
        } else if (end != nullptr && name == "--runs") {
            runs = number;
        } else if (end != nullptr && name == "--seed") {
            seed = number;
        } else if (end != nullptr && name == "--first") {
            run = number;
        } else {
            std::fprintf(stderr, "usage: %s [--seconds N] [--runs N] [--seed N] [--first N]\n", argv[0]);
            return 2;
        }
    }
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_set_death_callback(say_where);
#endif
    const auto start = std::chrono::steady_clock::now();
    unsigned long long done = 0;
    for (; done < runs; ++done, ++run) {
        if (std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() > seconds) break;
        std::seed_seq words{static_cast<uint32_t>(seed), static_cast<uint32_t>(run), static_cast<uint32_t>(run >> 32)};
        std::mt19937 random(words);
        std::vector<uint8_t> bytes(16 + random() % 240);
        for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random());
        LLVMFuzzerTestOneInput(bytes.data(), bytes.size());
    }
    std::printf("%llu inputs of seed %llu, no failure\n", done, seed);
    return 0;
}

#endif

}  // namespace rarefy::fuzz

#if defined(__SANITIZE_ADDRESS__)
// Sizes from a damaged file may ask for any amount of memory: that must be an exception as it is without the sanitizer.
extern "C" const char* __asan_default_options() {
    return "allocator_may_return_null=1:max_allocation_size_mb=512:handle_abort=1:detect_stack_use_after_return=1";
}
#endif

#if !defined(RAREFY_LIBFUZZER)
int main(int argc, char** argv) { return rarefy::fuzz::drive(argc, argv); }
#endif
