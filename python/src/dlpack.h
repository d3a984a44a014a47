/* DLPack (dmlc/dlpack): the layout of a tensor, the same in every version of its ABI, and of the exchange API of versions 1.3 and later, by which a tensor's
 * type says where its values lie without a capsule. */
#ifndef AQPY_DLPACK_H
#define AQPY_DLPACK_H

#include <stdint.h>

#define AQPY_DLPACK_MAJOR 1

typedef struct aqpy_dltensor {
    void *data;
    int32_t device_type, device_id;
    int32_t ndim;
    uint8_t type_code, type_bits;
    uint16_t type_lanes;
    int64_t *shape, *strides; /* strides in elements; NULL: C order */
    uint64_t byte_offset;
} aqpy_dltensor;

/* What the capsule "dlpack_exchange_api" holds, the attribute __dlpack_c_exchange_api__ of a tensor's type. It lives as long as the process. */
typedef struct aqpy_dlexchange {
    uint32_t major, minor;
    struct aqpy_dlexchange *older;
    void (*allocate)(void), (*managed_of_object)(void), (*object_of_managed)(void); /* not called here */
    /* Describes the tensor behind an object of that very type, which still owns everything. Not 0: an exception. */
    int (*tensor_of_object)(void *object, aqpy_dltensor *out);
} aqpy_dlexchange;

#endif
