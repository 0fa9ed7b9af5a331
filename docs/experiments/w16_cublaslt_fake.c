// Stands in for libcublasLt where there is no GPU: the entry points that w16_cublaslt.py calls, on the host's memory.
// Where the compiler finds cublasLt.h, its prototypes hold these, and its sizes and numbers those of the Python file:
//     cc -fsyntax-only -Werror -I FOLDER_OF_THE_HEADERS docs/experiments/w16_cublaslt_fake.c
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if __has_include(<cublasLt.h>)
#include <cublasLt.h>
#define SAME(name, number) _Static_assert((name) == (number), #name)
SAME(sizeof(cublasLtMatmulAlgo_t), 64);
SAME(sizeof(cublasLtMatmulHeuristicResult_t), 96);
SAME(offsetof(cublasLtMatmulHeuristicResult_t, workspaceSize), 64);
SAME(offsetof(cublasLtMatmulHeuristicResult_t, state), 72);
SAME(offsetof(cublasLtMatmulHeuristicResult_t, wavesCount), 76);
SAME(CUDA_R_16F, 2);
SAME(CUDA_R_32F, 0);
SAME(CUBLAS_COMPUTE_32F, 68);
SAME(CUBLAS_OP_T, 1);
SAME(CUBLASLT_MATMUL_DESC_TRANSA, 3);
SAME(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, 1);
SAME(CUBLASLT_ALGO_CAP_SPLITK_SUPPORT, 0);
SAME(CUBLASLT_ALGO_CAP_REDUCTION_SCHEME_MASK, 1);
SAME(CUBLASLT_ALGO_CAP_CTA_SWIZZLING_SUPPORT, 2);
SAME(CUBLASLT_ALGO_CAP_TILE_IDS, 6);
SAME(CUBLASLT_ALGO_CAP_CUSTOM_OPTION_MAX, 7);
SAME(CUBLASLT_ALGO_CAP_STAGES_IDS, 13);
SAME(CUBLASLT_ALGO_CONFIG_ID, 0);
SAME(CUBLASLT_ALGO_CONFIG_TILE_ID, 1);
SAME(CUBLASLT_ALGO_CONFIG_SPLITK_NUM, 2);
SAME(CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME, 3);
SAME(CUBLASLT_ALGO_CONFIG_CTA_SWIZZLING, 4);
SAME(CUBLASLT_ALGO_CONFIG_CUSTOM_OPTION, 5);
SAME(CUBLASLT_ALGO_CONFIG_STAGES_ID, 6);
SAME(CUBLASLT_ALGO_CONFIG_INNER_SHAPE_ID, 7);
SAME(CUBLASLT_ALGO_CONFIG_CLUSTER_SHAPE_ID, 8);
SAME(CUBLASLT_REDUCTION_SCHEME_INPLACE, 1);
SAME(CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE, 2);
SAME(CUBLASLT_CLUSTER_SHAPE_1x1x1, 2);
SAME(CUBLASLT_CLUSTER_SHAPE_2x1x1, 3);
SAME(CUBLASLT_CLUSTER_SHAPE_4x1x1, 4);
SAME(CUBLASLT_CLUSTER_SHAPE_1x2x1, 5);
SAME(CUBLASLT_CLUSTER_SHAPE_2x2x1, 6);
SAME(CUBLASLT_CLUSTER_SHAPE_1x4x1, 8);
#else
typedef int cublasStatus_t, cublasComputeType_t, cudaDataType, cudaDataType_t;
typedef int cublasLtMatmulDescAttributes_t, cublasLtMatmulPreferenceAttributes_t;
typedef int cublasLtMatmulAlgoConfigAttributes_t, cublasLtMatmulAlgoCapAttributes_t;
typedef struct cublasLtContext *cublasLtHandle_t;
typedef void *cudaStream_t;
typedef struct { uint64_t data[8]; } cublasLtMatmulAlgo_t, *cublasLtMatrixLayout_t, *cublasLtMatmulPreference_t;
typedef struct { uint64_t data[32]; } *cublasLtMatmulDesc_t;
typedef struct {
    cublasLtMatmulAlgo_t algo;
    size_t workspaceSize;
    cublasStatus_t state;
    float wavesCount;
    int reserved[4];
} cublasLtMatmulHeuristicResult_t;
#endif

enum { FINE = 0, INVALID = 7, UNSUPPORTED = 15 };
enum { ID = 0, TILE = 1, SPLITS = 2, CLUSTER = 8, ATTRIBUTES = 9 };
enum { WRONG_ID = 90, REFUSED_ID = 91, ADVERTISED = 6 };
static const size_t WIDTH[ATTRIBUTES] = {4, 4, 4, 4, 4, 4, 4, 2, 2};
static const uint32_t TILES[] = {20, 23, 24}, STAGES[] = {15, 16}, REDUCTIONS = 7, YES = 1, CUSTOM_MOST = 2;

// data[i / 2] of an algorithm holds attribute i in its lower or upper half
static uint32_t *place(const cublasLtMatmulAlgo_t *algo, int attribute) { return (uint32_t *)algo->data + attribute; }

size_t cublasLtGetVersion(void) { return 0; }
const char *cublasLtGetStatusName(cublasStatus_t status) {
    return (int)status == UNSUPPORTED ? "CUBLAS_STATUS_NOT_SUPPORTED" : "CUBLAS_STATUS_INVALID_VALUE";
}

cublasStatus_t cublasLtCreate(cublasLtHandle_t *handle) {
    *handle = malloc(1);
    return FINE;
}

cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *desc, cublasComputeType_t compute, cudaDataType_t scale) {
    *desc = calloc(1, 256);
    return compute == 68 && scale == 0 ? FINE : INVALID;
}

cublasStatus_t cublasLtMatmulDescSetAttribute(
    cublasLtMatmulDesc_t desc, cublasLtMatmulDescAttributes_t attribute, const void *value, size_t size) {
    if (attribute != 3 || size != 4) return INVALID;
    memcpy(desc, value, size);
    return FINE;
}

cublasStatus_t cublasLtMatrixLayoutCreate(
    cublasLtMatrixLayout_t *layout, cudaDataType type, uint64_t rows, uint64_t columns, int64_t stride) {
    *layout = calloc(1, 64);
    (*layout)->data[0] = rows, (*layout)->data[1] = columns, (*layout)->data[2] = stride;
    return type == 2 && (uint64_t)stride >= rows ? FINE : INVALID;
}

cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *preference) {
    *preference = calloc(1, 64);
    return FINE;
}

cublasStatus_t cublasLtMatmulPreferenceSetAttribute(
    cublasLtMatmulPreference_t preference, cublasLtMatmulPreferenceAttributes_t attribute, const void *value, size_t size) {
    if (attribute != 1 || size != 8) return INVALID;
    memcpy(preference, value, size);
    return FINE;
}

cublasStatus_t cublasLtMatmulAlgoGetHeuristic(
    cublasLtHandle_t handle, cublasLtMatmulDesc_t desc, cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
    cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d, cublasLtMatmulPreference_t preference, int asked,
    cublasLtMatmulHeuristicResult_t results[], int *found) {
    if (!handle || preference->data[0] != 32 << 20 || a->data[0] != b->data[0] || a->data[1] != d->data[0]) return INVALID;
    *found = asked < ADVERTISED ? asked : ADVERTISED;
    memset(results, 0, asked * sizeof(*results));
    for (int i = 0; i < *found; i++) {
        *place(&results[i].algo, ID) = i == 4 ? WRONG_ID : i == 3 ? REFUSED_ID : 66;
        *place(&results[i].algo, TILE) = i == 5 ? TILES[0] : TILES[i % 3];  // the last one repeats the first
        *place(&results[i].algo, SPLITS) = 1;
        *place(&results[i].algo, CLUSTER) = i == 5 ? 3 : 3 + i;
        results[i].wavesCount = 1;
    }
    return FINE;
}

cublasStatus_t cublasLtMatmulAlgoCheck(
    cublasLtHandle_t handle, cublasLtMatmulDesc_t desc, cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
    cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d, const cublasLtMatmulAlgo_t *algo,
    cublasLtMatmulHeuristicResult_t *result) {
    result->workspaceSize = *place(algo, SPLITS) == 4 ? (size_t)64 << 20 : 0;  // more than torch has
    return *place(algo, CLUSTER) == 8 ? UNSUPPORTED : FINE;
}

cublasStatus_t cublasLtMatmulAlgoConfigGetAttribute(
    const cublasLtMatmulAlgo_t *algo, cublasLtMatmulAlgoConfigAttributes_t attribute, void *value, size_t size,
    size_t *written) {
    if ((unsigned)attribute >= ATTRIBUTES || size != WIDTH[attribute]) return INVALID;
    memcpy(value, place(algo, attribute), size);
    *written = size;
    return FINE;
}

cublasStatus_t cublasLtMatmulAlgoConfigSetAttribute(
    cublasLtMatmulAlgo_t *algo, cublasLtMatmulAlgoConfigAttributes_t attribute, const void *value, size_t size) {
    if ((unsigned)attribute >= ATTRIBUTES || size != WIDTH[attribute]) return INVALID;
    memcpy(place(algo, attribute), value, size);
    return FINE;
}

cublasStatus_t cublasLtMatmulAlgoCapGetAttribute(
    const cublasLtMatmulAlgo_t *algo, cublasLtMatmulAlgoCapAttributes_t attribute, void *value, size_t size,
    size_t *written) {
    const uint32_t *from = attribute == 6    ? TILES
                           : attribute == 13 ? STAGES
                           : attribute == 1  ? &REDUCTIONS
                           : attribute == 7  ? &CUSTOM_MOST
                                             : &YES;
    size_t full = attribute == 6 ? sizeof TILES : attribute == 13 ? sizeof STAGES : 4;
    *written = full;
    if (size == 0) return FINE;
    if (size != full) return INVALID;
    memcpy(value, from, size);
    return FINE;
}

cublasStatus_t cublasLtMatmul(
    cublasLtHandle_t handle, cublasLtMatmulDesc_t desc, const void *alpha, const void *a, cublasLtMatrixLayout_t a_layout,
    const void *b, cublasLtMatrixLayout_t b_layout, const void *beta, const void *c, cublasLtMatrixLayout_t c_layout,
    void *d, cublasLtMatrixLayout_t d_layout, const cublasLtMatmulAlgo_t *algo, void *workspace, size_t workspace_bytes,
    cudaStream_t stream) {
    if (*place(algo, ID) == REFUSED_ID) return UNSUPPORTED;
    if (*(const float *)alpha != 1 || *(const float *)beta != 0 || c != d || !workspace || stream) return INVALID;
    if ((uint32_t)desc->data[0] != 1 || workspace_bytes != 32 << 20) return INVALID;
    uint64_t depth = a_layout->data[0], outputs = a_layout->data[1], rows = b_layout->data[1];
    const _Float16 *weight = a, *x = b;
    for (uint64_t row = 0; row < rows; row++)
        for (uint64_t output = 0; output < outputs; output++) {
            if (*place(algo, ID) == WRONG_ID && output == outputs - 1) continue;
            float sum = 0;
            for (uint64_t i = 0; i < depth; i++)
                sum += (float)weight[output * a_layout->data[2] + i] * (float)x[row * b_layout->data[2] + i];
            ((_Float16 *)d)[row * d_layout->data[2] + output] = (_Float16)sum;
        }
    return FINE;
}
