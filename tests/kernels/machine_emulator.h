// The machine of kernels/cuda/machine.h on a CPU: every thread of a cluster is a fiber; warps, warpgroups, blocks and clusters
// meet where the hardware would make them meet. Late by intent: cp.async lands when it is waited for, wgmma reads its
// operands when it is waited for, so that a buffer given back too early shows. Layouts are those of PTX ISA 8.
#pragma once
#include "emulated_fibers.h"
#include "emulated_numbers.h"
#include "emulated_memory.h"
#include "emulated_matrices.h"
