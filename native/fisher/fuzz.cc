// Any numbers, of every shape that the bindings let through, into the work on blocks on every instruction set of this
// machine: no access outside of the arrays, and every block by itself.
#include "common/fuzz.h"
#include "common/cpu.h"
#include "fisher/fisher.h"

namespace {

using namespace rarefy;
using fuzz::Exact;
using fuzz::Input;

// What `work(first block, number of blocks, out)` writes at once and in two parts must be the same.
template <class Work>
void check(Input& input, const char* what, int64_t num_blocks, const std::vector<float>& before, Work work) {
    const Exact<float> whole(before), parts(before);
    const int64_t cut = input.between(0, num_blocks);
    work(0, num_blocks, whole.data());
    work(0, cut, parts.data());
    work(cut, num_blocks - cut, parts.data());
    if (!before.empty() && std::memcmp(whole.data(), parts.data(), before.size() * 4) != 0)
        fuzz::fail(std::string(what) + ": other bits where blocks are worked on in parts");
}

std::vector<float> some(Input& input, int64_t count) { return fuzz::floats(input, count, false); }

template <class Number, class Function>
void sums(Input& input, int64_t num_blocks, int size, Function function) {
    const int64_t num_rows = input.between(0, 9), width = num_blocks * size;
    std::vector<Exact<Number>> rows;
    std::vector<const Number*> places;
    for (int64_t n = 0; n < num_rows; ++n) {
        const std::vector<float> values = some(input, width);
        std::vector<Number> numbers(static_cast<size_t>(width));
        if (width > 0) std::memcpy(numbers.data(), values.data(), numbers.size() * sizeof(Number));
        rows.emplace_back(numbers);
        places.push_back(rows.back().data());
    }
    const Exact<const Number*> x(places);
    const int64_t triangle = fisher::triangle(size);
    check(input, "sums", num_blocks, some(input, num_blocks * triangle), [&](int64_t first, int64_t count, float* out) {
        function(x.data(), num_rows, first * size, count, size, out + first * triangle);
    });
}

void surgery(Input& input, const fisher::Functions& functions, int64_t num_blocks, int size) {
    const int64_t triangle = fisher::triangle(size), square = int64_t{size} * size, width = num_blocks * size;
    const Exact<float> block(some(input, num_blocks * triangle)), inverse(some(input, num_blocks * square));
    const std::vector<float> weights = some(input, width), nothing(static_cast<size_t>(width));
    const Exact<float> weight(weights);
    std::vector<uint8_t> bits(static_cast<size_t>(width));
    for (uint8_t& bit : bits) bit = input.one_in(3);
    const Exact<uint8_t> mask(bits);
    const double scale = input.pick({1.0, 0.0, 1e300, -1.0}), damp = input.pick({0.1, 0.0, 1e30});
    check(input, "inverses", num_blocks, std::vector<float>(static_cast<size_t>(num_blocks * square)),
          [&](int64_t first, int64_t count, float* out) {
              functions.invert(block.data() + first * triangle, count, size, scale, damp, out + first * square);
          });
    check(input, "costs", num_blocks, nothing, [&](int64_t first, int64_t count, float* out) {
        functions.costs(weight.data() + first * size, inverse.data() + first * square, mask.data() + first * size,
                        count, size, out + first * size);
    });
    functions.drop(mask.data(), num_blocks, size, weight.data(), inverse.data());
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    Input input(data, size);
    const fisher::Functions& functions = input.one_in(2) ? fisher::reference : fisher::functions();
    const auto width = static_cast<int>(input.one_in(2) ? 16 : 1 + input.size(input.one_in(8) ? 200 : 40));
    const int64_t num_blocks = width > 64 ? input.between(0, 3) : input.between(0, 40);
    switch (input.between(0, 2)) {
        case 0: sums<float>(input, num_blocks, width, functions.add_float); break;
        case 1: sums<uint16_t>(input, num_blocks, width, functions.add_bf16); break;
        default: surgery(input, functions, num_blocks, width);
    }
    return 0;
}
