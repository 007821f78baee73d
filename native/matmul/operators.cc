#include "matmul/operators.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

#include "common/pool.h"
#include "matmul/activations.h"
#include "matmul/dispatch.h"

namespace rarefy::matmul {
namespace {

constexpr int64_t kAlignedFloats = 16;
constexpr int64_t kMaxFloats = int64_t{1} << 44;

void add(float* sum, const float* terms, int64_t count) {
    constexpr int64_t kChunk = 16384;
    common::parallel_for(static_cast<int>(ceil_div(count, kChunk)), [&](int chunk) {
        const int64_t end = std::min(count, (chunk + 1) * kChunk);
        for (int64_t i = chunk * kChunk; i < end; ++i) sum[i] += terms[i];
    });
}

}  // namespace

Operator::Operator(std::shared_ptr<const Weights> weights)
    : weights_(std::move(weights)),
      num_outputs_(weights_->view().num_outputs),
      num_inputs_(weights_->view().num_inputs) {}

Operator Operator::chain(const Operator& inner, const Operator& outer, int64_t num_runs) {
    constexpr int64_t kMaxWidth = int64_t{1} << 40;
    if (num_runs < 1 || inner.num_inputs_ > kMaxWidth / num_runs || inner.num_outputs_ > kMaxWidth / num_runs ||
        num_runs * inner.num_outputs_ != outer.num_inputs_)
        throw std::invalid_argument("the outputs of the inner weight are not the inputs of the outer one");
    Operator made;
    made.parts_ = {inner, outer};
    made.num_runs_ = num_runs;
    made.num_outputs_ = outer.num_outputs_;
    made.num_inputs_ = num_runs * inner.num_inputs_;
    made.scratch_per_row_ = num_runs * (inner.num_outputs_ + inner.scratch_per_row_) + outer.scratch_per_row_;
    made.num_scratches_ = 1 + inner.num_scratches_ + outer.num_scratches_;
    return made;
}

Operator Operator::sum(const Operator& first, const Operator& second) {
    if (first.num_outputs_ != second.num_outputs_ || first.num_inputs_ != second.num_inputs_)
        throw std::invalid_argument("weights of unlike shapes have no sum");
    Operator made;
    made.parts_ = {first, second};
    made.num_outputs_ = first.num_outputs_;
    made.num_inputs_ = first.num_inputs_;
    made.scratch_per_row_ = first.num_outputs_ + first.scratch_per_row_ + second.scratch_per_row_;
    made.num_scratches_ = 1 + first.num_scratches_ + second.num_scratches_;
    return made;
}

int64_t Operator::num_bytes() const {
    int64_t total = weights_ == nullptr ? 0 : weights_->num_bytes();
    for (const Operator& part : parts_) total += part.num_bytes();
    return total;
}

int64_t Operator::num_read_bytes() const {
    int64_t total = weights_ == nullptr ? 0 : weights_->num_read_bytes();
    for (const Operator& part : parts_) total += part.num_read_bytes();
    return total;
}

bool Operator::depends_on_rows() const {
    if (weights_ != nullptr) return weights_->isa() == Isa::amx && weights_->is_bf16();
    return std::any_of(parts_.begin(), parts_.end(), [](const Operator& part) { return part.depends_on_rows(); });
}

// The products of one x: those with weights that x itself meets, in one fork-join, and then what is left of each.
class Call {
public:
    // `free`: floats for what lies between the parts; the call takes what it needs from its front.
    Call(const float* x, int64_t num_rows, int64_t num_inputs, float*& free)
        : x_(x), num_rows_(num_rows), num_inputs_(num_inputs), free_(free) {}

    static int64_t count_floats(const Operator& by, int64_t num_rows) {
        if (by.scratch_per_row_ > kMaxFloats / std::max<int64_t>(1, num_rows)) throw std::bad_alloc();
        return by.scratch_per_row_ * num_rows + by.num_scratches_ * kAlignedFloats;
    }

    void add_target(const Operator& by, float* y) {
        if (by.weights_ != nullptr) {
            products_.push_back({by.weights_.get(), y});
        } else if (by.num_runs_ == 0) {
            float* terms = take(num_rows_ * by.num_outputs_);
            add_target(by.parts_[0], y);
            add_target(by.parts_[1], terms);
            steps_.push_back({&by, terms, y});
        } else if (by.num_runs_ == 1) {
            float* inside = take(num_rows_ * by.parts_[0].num_outputs_);
            add_target(by.parts_[0], inside);
            steps_.push_back({&by, inside, y});
        } else {
            steps_.push_back({&by, nullptr, y});
        }
    }

    void run() {
        if (!products_.empty()) multiply(x_, num_rows_, num_inputs_, products_);
        for (const Step& step : steps_) {
            const int64_t num_runs = step.by->num_runs_;
            if (num_runs == 0) {
                add(step.y, step.from, num_rows_ * step.by->num_outputs_);
                continue;
            }
            const Operator &inner = step.by->parts_[0], &outer = step.by->parts_[1];
            float* inside = step.from;
            if (num_runs > 1) {
                inside = take(num_rows_ * num_runs * inner.num_outputs_);
                multiply_by(inner, x_, num_rows_ * num_runs, inside);
            }
            multiply_by(outer, inside, num_rows_, step.y);
        }
    }

private:
    // What is left to do when x has met the weights.
    struct Step {
        const Operator* by;
        float* from;
        float* y;
    };

    float* take(int64_t count) {
        float* taken = free_;
        free_ += ceil_div(count, kAlignedFloats) * kAlignedFloats;
        return taken;
    }

    void multiply_by(const Operator& by, const float* x, int64_t num_rows, float* y) {
        Call call(x, num_rows, by.num_inputs_, free_);
        call.add_target(by, y);
        call.run();
    }

    const float* x_;
    int64_t num_rows_, num_inputs_;
    float*& free_;
    std::vector<Product> products_;
    std::vector<Step> steps_;
};

void multiply(const float* x, int64_t num_rows, int64_t num_inputs, const std::vector<Target>& targets) {
    thread_local Scratch scratch;
    int64_t num_floats = 0;
    for (const Target& target : targets) num_floats += Call::count_floats(*target.by, num_rows);
    auto* free = scratch.floats(num_floats);
    Call call(x, num_rows, num_inputs, free);
    for (const Target& target : targets) call.add_target(*target.by, target.y);
    call.run();
    scratch.trim();
}

}  // namespace rarefy::matmul
