/* Fuzz target: the container reader. The input is one Parquet file; everything a reader can be asked for is asked.
 *
 * A custom mutator knows where the interesting bytes are: it keeps the magic and the footer length right and changes the footer, page headers and levels,
 * because random flips die at the first check. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <arrowquant/store.h>

size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t max_size);

static uint32_t read_u32(const uint8_t *p) { return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24; }

/* Mutates the footer (half of the time) or the data before it; then repairs the frame around them. */
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max_size, unsigned seed) {
    uint32_t footer = size >= 12 ? read_u32(data + size - 8) : 0;
    if (size < 12 || footer > size - 12 || size + 64 > max_size || seed % 16 == 0) return LLVMFuzzerMutate(data, size, max_size);
    size_t begin = size - 8 - footer;
    if (seed % 2) { /* in place: offsets in the footer stay right */
        if (begin > 4) LLVMFuzzerMutate(data + 4, begin - 4, begin - 4);
        return size;
    }
    size_t n = LLVMFuzzerMutate(data + begin, footer, footer + 56);
    for (int i = 0; i < 4; i++) data[begin + n + (size_t)i] = (uint8_t)(n >> 8 * i);
    memcpy(data + begin + n + 4, "PAR1", 4);
    return begin + n + 8;
}

static void ignore(void *user, const char *problem) {
    (void)user;
    if (strlen(problem) > 1 << 20) abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static char path[64];
    static int fd = -1;
    if (fd < 0) { /* a file in memory, opened by its name in /proc */
        fd = memfd_create("container", 0);
        if (fd < 0) abort();
        snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    }
    if (ftruncate(fd, 0) != 0 || pwrite(fd, data, size, 0) != (ssize_t)size) abort();
    aq_error err;
    aq_store *store;
    if (aq_store_open(&store, path, &err) != AQ_OK) {
        if (err.message[0] == 0) abort(); /* a refusal says why */
        return 0;
    }
    for (size_t i = 0; i < aq_store_n_tensors(store); i++) {
        const aq_store_tensor *t = aq_store_tensor_at(store, i);
        uint64_t sum = 0;
        if (aq_store_find(store, t->name) != (int64_t)i) abort();
        for (size_t k = 0; k < t->n_parts; k++) {
            aq_store_record part;
            if (aq_store_part(store, i, k, &part, &err) != AQ_OK) abort();
            for (uint64_t b = 0; b < part.data_bytes; b++) sum += ((const uint8_t *)part.data)[b];
            for (uint64_t b = 0; b < part.params_bytes; b++) sum += ((const uint8_t *)part.params)[b];
        }
        if (t->num_params > 1 << 22) continue;
        float *out = malloc((t->num_params + 1) * sizeof *out);
        if (out && aq_store_read_f32(store, i, 0, t->rows, out, &err) == AQ_OK && t->rows > 1) aq_store_read_f32(store, i, 1, t->rows - 1, out, &err);
        free(out);
        if (t->quantized && t->layout.n_pairs < 1 << 20) {
            float *pairs = malloc((2 * t->layout.n_pairs + 1) * sizeof *pairs);
            if (pairs) aq_store_pairs(store, i, pairs, pairs + t->layout.n_pairs, &err);
            free(pairs);
        }
        if (sum == UINT64_MAX) abort();
    }
    aq_store_verify(store, ignore, NULL, &err);
    aq_store_close(store);
    return 0;
}
