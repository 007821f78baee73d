// Any shape of activations, with any bits, into the Gram matrix: no access outside of the arrays.
#include "common/fuzz.h"
#include "common/pool.h"
#include "gram/gram.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    using namespace rarefy;
    if (!gram::can_run()) return 0;
    fuzz::Input input(data, size);
    const int64_t num_tokens = input.size(600), num_features = input.size(200);
    std::mt19937 random(static_cast<unsigned>(input.bits(4)));
    std::vector<uint16_t> bits(static_cast<size_t>(num_tokens * num_features));
    for (uint16_t& word : bits) word = static_cast<uint16_t>(random());
    const fuzz::Exact<uint16_t> x(bits);
    const std::vector<float> zeros(static_cast<size_t>(num_features * num_features));
    const fuzz::Exact<float> one(zeros), many(zeros);
    common::set_num_threads(1);
    gram::add(x.data(), num_tokens, num_features, one.data());
    common::set_num_threads(static_cast<int>(input.between(1, 4)));
    gram::add(x.data(), num_tokens, num_features, many.data());
    if (!zeros.empty() && std::memcmp(one.data(), many.data(), zeros.size() * 4) != 0)
        fuzz::fail("other bits with other threads");
    return 0;
}
