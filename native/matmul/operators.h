// What x is multiplied with: a weight, or weights one after the other or side by side.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "matmul/weights.h"

namespace rarefy::matmul {

// Immutable. Its parts share their weights with the operators that they were made of.
class Operator {
public:
    explicit Operator(std::shared_ptr<const Weights> weights);
    // Each of `num_runs` equal runs of x meets `inner`, and what comes out of all of them meets `outer`: of one run, a
    // low-rank pair. Throws std::invalid_argument where the shapes do not fit; so does sum.
    static Operator chain(const Operator& inner, const Operator& outer, int64_t num_runs);
    // x meets both, and the outputs are added.
    static Operator sum(const Operator& first, const Operator& second);

    int64_t num_outputs() const { return num_outputs_; }
    int64_t num_inputs() const { return num_inputs_; }
    int64_t num_bytes() const;
    int64_t num_read_bytes() const;  // by one row
    // Whether the bits of a row depend on how many there are (contract.h): those of bfloat16 on AMX do.
    bool depends_on_rows() const;
    // Null where it is made of parts.
    const Weights* weights() const { return weights_.get(); }
    // Of one made of parts: inner and outer (0 and 1) of a chain, first and second of a sum; and the runs, 0 of a sum.
    const Operator& part(size_t number) const { return parts_[number]; }
    int64_t num_runs() const { return num_runs_; }

private:
    friend class Call;
    Operator() = default;

    std::shared_ptr<const Weights> weights_;
    std::vector<Operator> parts_;  // inner and outer, or first and second
    int64_t num_runs_ = 0;         // 0: a sum
    int64_t num_outputs_ = 0, num_inputs_ = 0;
    int64_t scratch_per_row_ = 0;  // floats between the parts, for each row of x
    int64_t num_scratches_ = 0;    // and so many pieces of them
};

// One product of a call: y (T, O), contiguous.
struct Target {
    const Operator* by;
    float* y;
};

// y = the product of x (T, I), contiguous, with every operator; all have I inputs. What meets x itself shares one
// quantization and one fork-join. The same bits as separate calls.
void multiply(const float* x, int64_t num_rows, int64_t num_inputs, const std::vector<Target>& targets);

}  // namespace rarefy::matmul
