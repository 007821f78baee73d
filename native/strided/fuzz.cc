// Any view of any memory into the strided copy: no access outside of either, and every number in its place.
#include "common/fuzz.h"
#include "common/pool.h"
#include "strided/strided.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    using namespace rarefy;
    fuzz::Input input(data, size);
    strided::View view{nullptr, static_cast<int>(input.between(0, 6)), {}, {}};
    int64_t count = 1, lowest = 0, highest = 0;
    for (int axis = 0; axis < view.num_axes; ++axis) {
        view.sizes[axis] = input.one_in(4) ? input.size(300) : input.between(0, 9);
        if (count * view.sizes[axis] > (1 << 17)) view.sizes[axis] = 1;
        count *= view.sizes[axis];
        // Often that of an array in this order, so that axes are joined.
        view.strides[axis] = input.one_in(3) ? count : input.between(-40, 300);
        if (view.sizes[axis] == 0) continue;
        int64_t& end = view.strides[axis] < 0 ? lowest : highest;
        end += (view.sizes[axis] - 1) * view.strides[axis];
    }
    if (highest - lowest > (1 << 22)) return 0;
    const auto reach = static_cast<size_t>(count == 0 ? 0 : highest - lowest + 1);
    const fuzz::Exact<float> memory(reach), out(static_cast<size_t>(count));
    for (size_t i = 0; i < reach; ++i) memory.data()[i] = static_cast<float>(i);
    view.data = memory.data() - lowest;
    common::set_num_threads(static_cast<int>(input.between(1, 4)));
    strided::copy(view, out.data());
    for (int64_t i = 0; i < count; ++i) {
        int64_t place = -lowest;
        for (int64_t rest = i, axis = view.num_axes - 1; axis >= 0; --axis) {
            place += rest % view.sizes[axis] * view.strides[axis];
            rest /= view.sizes[axis];
        }
        if (out.data()[i] != static_cast<float>(place)) fuzz::fail("a number of a view is not in its place");
    }
    return 0;
}
