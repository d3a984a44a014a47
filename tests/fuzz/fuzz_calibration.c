/* Fuzz target: files of calibration statistics. The bytes are one file; what is opened is read whole, summed up, merged and written. In this build hashes are
 * not compared (FUZZING_BUILD_MODE_UNSAFE_FOR_PRODUCTION), since no mutation would get past them: what a hostile writer could do with right ones is tried. */
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

static void heard(void *user, const char *sentence) { *(uint64_t *)user += sentence[0] != 0; }

/* Figures that are shown are finite and in order. */
static void look_at(const aq_calib *c, size_t layer) {
    uint64_t n = aq_calib_n_inputs(c, layer), n_rows;
    size_t n_timesteps;
    const double *rows, *cols;
    require(aq_calib_find(c, aq_calib_layer_name(c, layer)) == (int64_t)layer);
    for (uint32_t g = 0; g < aq_calib_settings(c)->n_groups; g++) {
        aq_calib_stats s = aq_calib_group(c, layer, g);
        for (uint64_t j = 0; s.count > 0 && j < n; j++) require(isfinite(s.sum[j]) && s.sum_sq[j] >= 0 && s.min[j] <= s.max[j] && s.absmax[j] >= s.max[j]);
    }
    const aq_timestep_stats *t = aq_calib_timesteps(c, layer, &n_timesteps);
    for (size_t i = 0; i < n_timesteps; i++) require(isfinite(t[i].mean) && t[i].min <= t[i].max && (i == 0 || t[i].timestep > t[i - 1].timestep));
    if (aq_calib_gradient(c, layer, &rows, &n_rows, &cols)) require(isfinite(rows[n_rows - 1]) && isfinite(cols[n - 1]));
    if (!aq_calib_has_hessian(c, layer) || n > 512) return;
    float *h = malloc(n * n * sizeof *h);
    aq_error err;
    if (h && aq_calib_hessian(c, layer, NULL, h, &err) == AQ_OK) require(isfinite(h[0]) && isfinite(h[n * n - 1]));
    free(h);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static char path[64];
    static int fd = -1;
    if (fd < 0) {
        fd = memfd_create("calibration", 0);
        require(fd >= 0);
        snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    }
    require(ftruncate(fd, 0) == 0 && pwrite(fd, data, size, 0) == (ssize_t)size);
    aq_error err;
    aq_calib *c, *twice = NULL;
    char fingerprint[65];
    uint64_t n_warnings = 0, n_inputs = 0;
    aq_status status = aq_calib_open(&c, path, &err);
    if (status != AQ_OK) {
        require(status == err.code && err.message[0]); /* a refusal says why */
        return 0;
    }
    bool sound = aq_calib_verify(c, &err) == AQ_OK;
    for (size_t i = 0; i < aq_calib_n_layers(c); i++) {
        look_at(c, i);
        n_inputs += aq_calib_n_inputs(c, i);
    }
    aq_calib_warnings(c, heard, &n_warnings);
    if (sound && n_inputs < 4096 && aq_calib_create(&twice, aq_calib_settings(c), &err) == AQ_OK) {
        require(aq_calib_merge(twice, c, &err) == AQ_OK);
        require(aq_calib_merge(twice, c, &err) == AQ_OK || err.code == AQ_ERR_FORMAT);
        require(aq_calib_fingerprint(twice, fingerprint, &err) == AQ_OK);
    }
    aq_calib_free(twice);
    aq_calib_free(c);
    return 0;
}
