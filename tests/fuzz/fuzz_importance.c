/* Fuzz target: importance matrices of llama.cpp, legacy lists and GGUF. What is taken over has finite, non-negative mean squares for every input. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include <arrowquant/calibration.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void require(bool ok) {
    if (!ok) abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static char path[64];
    static int fd = -1;
    if (fd < 0) {
        fd = memfd_create("importance", 0);
        require(fd >= 0);
        snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    }
    require(ftruncate(fd, 0) == 0 && pwrite(fd, data, size, 0) == (ssize_t)size);
    aq_error err;
    aq_calib *c;
    aq_status status = aq_calib_import(&c, path, NULL, NULL, NULL, &err);
    require(status == AQ_OK || (status == err.code && err.message[0]));
    if (status != AQ_OK) return 0;
    require(aq_calib_n_layers(c) > 0);
    for (size_t i = 0; i < aq_calib_n_layers(c); i++) {
        uint64_t n = aq_calib_n_inputs(c, i);
        require(aq_calib_find(c, aq_calib_layer_name(c, i)) == (int64_t)i);
        float *d = malloc(n * sizeof *d);
        if (d && aq_calib_diagonal(c, i, NULL, d, &err) == AQ_OK)
            for (uint64_t j = 0; j < n; j++) require(isfinite(d[j]) && d[j] >= 0);
        free(d);
    }
    aq_calib_free(c);
    return 0;
}
