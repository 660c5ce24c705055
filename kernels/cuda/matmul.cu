// The products of every weight type: one token, up to four, up to eight, and tiles of many.
#include "matmul.cuh"

#define PRODUCTS(Type) \
    KERNEL(matmul_one_##Type, MatmulArgs) { matmul_few<Type, 1, 32>(args); } \
    KERNEL(matmul_four_##Type, MatmulArgs) { matmul_few<Type, 4, 16>(args); } \
    KERNEL(matmul_eight_##Type, MatmulArgs) { matmul_few<Type, 8, 8>(args); } \
    KERNEL(matmul_many_##Type, MatmulArgs) { matmul_many<Type>(args); }

EACH_WEIGHT_TYPE(PRODUCTS)
