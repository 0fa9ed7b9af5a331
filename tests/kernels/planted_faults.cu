// Two faults for a tool to find: without them its silence over our kernels would say nothing.

extern "C" __global__ void planted_faults(float* y, int count) {
    __shared__ float neighbours[64];
    neighbours[threadIdx.x] = y[0];
    y[0] = neighbours[threadIdx.x ^ 32];  // racecheck: another warp's, which nobody has waited for
    if (threadIdx.x == 0) y[count] = 1;   // memcheck: behind the last
}
