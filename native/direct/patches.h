// Convolutions as products of patches with packed weights, a strip of places at a time: a task writes out the patches
// of some places, quantizes and multiplies them, and puts the outputs where they belong, all in the caches of one core.
// The image is not copied as a whole, whatever the order of its axes, and there is one fork-join.
#pragma once

#include "direct/driver.h"

namespace rarefy::direct {

// Whether a strip fits into memory that a thread may keep.
bool fits_strips(const Convolution& convolution);
// `convolution.operators`: one for each group, with its outputs. Unlike convolve(), any number of channels and outputs
// may lie last. The bits are those of the products of all patches, where they do not depend on the number of rows.
void convolve_patches(const Convolution& convolution);

}  // namespace rarefy::direct
