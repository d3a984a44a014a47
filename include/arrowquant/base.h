/* ArrowQuant base: status values, error objects, element types, logging.
 *
 * Ownership: the caller owns every aq_error and aq_shape; nothing here allocates.
 * Every function of the library that can fail returns aq_status and takes an `aq_error *` last, which may be NULL.
 */
#ifndef ARROWQUANT_BASE_H
#define ARROWQUANT_BASE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(_WIN32)
#define AQ_API __declspec(dllexport)
#elif defined(__GNUC__)
#define AQ_API __attribute__((visibility("default")))
#else
#define AQ_API
#endif

#define AQ_VERSION "0.1.0"
/* Version of the container that this library writes; it reads every 1.x and 2.x. */
#define AQ_SCHEMA_VERSION "2.1"

/* Values equal the exit codes of the command line, so that a program can return them as they are. */
typedef enum aq_status {
    AQ_OK = 0,
    AQ_ERR_INTERNAL = 1,     /* a bug in ArrowQuant */
    AQ_ERR_USAGE = 2,        /* wrong argument or configuration */
    AQ_ERR_FORMAT = 3,       /* input refused: malformed, unsupported, already quantized */
    AQ_ERR_QUALITY = 4,      /* quality floor or verification not met */
    AQ_ERR_BUDGET = 5,       /* no allocation meets the size budget */
    AQ_ERR_IO = 6,           /* file system: missing, exists, permission, full */
    AQ_ERR_MEMORY = 7,       /* allocation failed or --max-memory too small */
    AQ_ERR_INTERRUPTED = 130 /* cancelled; the state is kept where a run can resume */
} aq_status;

/* One failure: what happened in one sentence, where, and what to do.
 * `message` is complete in itself: it starts with the file and tensor where there are any. `file`, `tensor` and `hint`
 * repeat the parts for programs; each is "" when it does not apply. Strings are UTF-8, control characters escaped, cut at the buffer's end. */
typedef struct aq_error {
    aq_status code;
    int os_errno; /* errno behind an AQ_ERR_IO, else 0 */
    char message[2048];
    char file[512];
    char tensor[256];
    char hint[512];
    uint64_t minimum_bytes; /* with AQ_ERR_BUDGET: the smallest size that can be reached; 0: not known */
} aq_error;

/* Sets `err` to "no error". */
AQ_API void aq_error_clear(aq_error *err);
/* Short stable word for a status: "ok", "internal", "usage", "format", "quality", "budget", "io", "memory", "interrupted". */
AQ_API const char *aq_status_name(aq_status status);

/* Element types as safetensors names them. Values index tables; they are not stored in files. */
typedef enum aq_dtype {
    AQ_F64,
    AQ_F32,
    AQ_F16,
    AQ_BF16,
    AQ_F8_E4M3,
    AQ_F8_E5M2,
    AQ_I64,
    AQ_I32,
    AQ_I16,
    AQ_I8,
    AQ_U64,
    AQ_U32,
    AQ_U16,
    AQ_U8,
    AQ_BOOL,
    AQ_DTYPE_OTHER, /* a type word that this version does not know; carried over verbatim when allowed */
    AQ_DTYPE_COUNT
} aq_dtype;

/* Bytes per element; 0 for AQ_DTYPE_OTHER. */
AQ_API size_t aq_dtype_size(aq_dtype dtype);
/* "F32", "BF16", …; "?" out of range. */
AQ_API const char *aq_dtype_name(aq_dtype dtype);
/* Reads such a name; AQ_DTYPE_OTHER when unknown. */
AQ_API aq_dtype aq_dtype_from_name(const char *name);
/* True for the floating types that can be quantized: F64, F32, F16, BF16, F8_*. */
AQ_API bool aq_dtype_is_float(aq_dtype dtype);

#define AQ_MAX_RANK 8

/* Shape of a tensor, outermost dimension first. Rank 0 is a scalar. */
typedef struct aq_shape {
    uint32_t rank;
    uint64_t dims[AQ_MAX_RANK];
} aq_shape;

/* Number of elements (1 for rank 0); false when the product overflows 64 bits. */
AQ_API bool aq_shape_count(const aq_shape *shape, uint64_t *out);
/* The matrix view [rows, cols]: rank 0 and 1 are one row, others dims[0] rows of the flattened rest. The count must not overflow. */
AQ_API void aq_shape_matrix(const aq_shape *shape, uint64_t *rows, uint64_t *cols);

typedef enum aq_log_level { AQ_LOG_ERROR, AQ_LOG_WARNING, AQ_LOG_INFO, AQ_LOG_DEBUG } aq_log_level;
/* Receives one line without newline. Called from the thread that started the work. */
typedef void (*aq_log_fn)(void *user, aq_log_level level, const char *message);

/* Threads that the host lends: in a program with a pool of its own, as torch has, threads of two pools would fight for the same processors.
 * run: calls work(context, i) at once on threads i = 0 (the caller's), 1, ..., n_threads - 1, and returns true when all those calls have returned; false,
 * without a call, when it has not so many threads to give. Fewer threads, or more, do no harm, and what comes out does not depend on who is which; but a host
 * that cuts its own loops by the same numbers finds its values in the same thread's cache. Called from any thread, also from several at once and inside of
 * `work`. */
typedef struct aq_executor {
    bool (*run)(void *user, int n_threads, void (*work)(void *context, int thread), void *context);
    void *user;
} aq_executor;
/* From now on loops of the whole process run on the threads of `executor`, which stays the caller's and valid until another is set and all calls have ended.
 * NULL, the default: threads are started for each call. A child of fork() starts with NULL, since pools do not survive a fork. */
AQ_API void aq_set_executor(const aq_executor *executor);

/* "0.1.0". */
AQ_API const char *aq_version(void);
/* Name of the instruction set whose kernels are in use: "scalar", "avx2", "avx512" or "neon". */
AQ_API const char *aq_isa_name(void);

#ifdef __cplusplus
}
#endif
#endif
