/* Fuzz target: data sets. The first byte says which reader gets the rest: JSON lines, an .npz archive, an .npy array or Parquet rows. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "base/mem.h"
#include "calibration/dataset.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void require(bool ok) {
    if (!ok) abort();
}

static aq_status open_as(aq_dataset *d, int kind, aq_error *err) {
    switch (kind) {
    case 0: return aq_dataset_open_lines(d, err);
    case 1: return aq_dataset_open_numpy(d, true, err);
    case 2: return aq_dataset_open_numpy(d, false, err);
    default: return aq_dataset_open_parquet(d, err);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static char path[64];
    static int fd = -1;
    if (fd < 0) {
        fd = memfd_create("dataset", 0);
        require(fd >= 0);
        snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    }
    if (size == 0) return 0;
    require(ftruncate(fd, 0) == 0 && pwrite(fd, data + 1, size - 1, 0) == (ssize_t)(size - 1));
    aq_error err;
    aq_sample s;
    bool end = false;
    aq_dataset *d = aq_calloc(1, sizeof *d); /* by its name the file would be no data set */
    require(d && (d->path = aq_strdup(path)));
    d->options.max_line_bytes = 4096;
    aq_status status = open_as(d, data[0] & 3, &err);
    for (int i = 0; status == AQ_OK && !end && i < 1000; i++) {
        status = aq_dataset_next(d, &s, &end, &err);
        if (status == AQ_ERR_FORMAT && !d->is_broken) status = AQ_OK; /* a bad line: the next one */
        if (status != AQ_OK || end || s.n_values == 0) continue;
        uint64_t count;
        if (s.shape.rank > 0) require(aq_shape_count(&s.shape, &count));
        for (uint64_t j = 0; s.values && j < s.n_values && j < 100000; j++) require(s.values[j] == s.values[j] || err.message[0]);
        if (s.text) require(strnlen(s.text, s.text_bytes + 1) <= s.text_bytes);
    }
    if (status != AQ_OK) require(err.message[0]);
    aq_dataset_close(d);
    return 0;
}
