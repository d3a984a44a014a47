/* `aq_bench model PATH [--bits N] [--method M]`: seconds of conversion and quantization alone, over the same tensors that a run would quantize.
 *
 * Each layer's bytes are touched before the clock starts, so that reading the file is not counted; metrics are computed, as a run does. Prints one number. */
#include "bench.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <arrowquant/arrowquant.h>

#include "base/file.h"

static int fail(const aq_error *err) {
    fprintf(stderr, "aq_bench: %s\n", err->message);
    return (int)err->code;
}

int bench_model(int argc, char **argv) {
    aq_error err;
    aq_model *model = NULL;
    aq_config *config = aq_config_create();
    if (argc < 2 || !config) return AQ_ERR_USAGE;
    for (int i = 2; i + 1 < argc; i += 2) {
        const char *field = strcmp(argv[i], "--bits") == 0 ? "bit_width" : strcmp(argv[i], "--method") == 0 ? "method" : NULL;
        if (!field || aq_config_set(config, field, argv[i + 1], argv[i], &err) != AQ_OK) return AQ_ERR_USAGE;
    }
    if (aq_model_open(&model, argv[1], NULL, &err) != AQ_OK) return fail(&err);
    double seconds = 0;
    for (size_t i = 0; i < aq_model_n_tensors(model); i++) {
        const aq_tensor_info *t = aq_model_tensor(model, i);
        aq_layer_choice choice;
        if (aq_config_choose(config, t, &choice, &err) != AQ_OK) return fail(&err);
        if (!choice.quantize) continue;
        uint64_t rows, cols;
        aq_quant_layout layout;
        aq_shape_matrix(&t->shape, &rows, &cols);
        if (aq_quant_layout_init(&layout, &choice.spec, rows, cols, &err) != AQ_OK) return fail(&err);
        float *w = malloc(t->count * sizeof *w);
        uint8_t *codes = malloc(layout.codes_bytes), *params = malloc(layout.params_bytes);
        if (!w || !codes || !params) return AQ_ERR_MEMORY;
        const volatile uint8_t *bytes = aq_model_data(model, i);
        for (uint64_t at = 0; at < t->size_bytes; at += 4096) (void)bytes[at];
        memset(w, 1, t->count * sizeof *w); /* fresh memory costs page faults, which are no part of the kernels */
        memset(codes, 1, layout.codes_bytes);
        memset(params, 1, layout.params_bytes);
        aq_quant_metrics metrics;
        double start = aq_now_s();
        if (aq_model_read_f32(model, i, 0, t->count, w, &err) != AQ_OK) return fail(&err);
        if (aq_quantize(w, &choice.spec, &layout, NULL, 0, codes, params, &metrics, NULL, &err) != AQ_OK) return fail(&err);
        seconds += aq_now_s() - start;
        aq_model_release(model, i);
        free(w);
        free(codes);
        free(params);
    }
    aq_model_close(model);
    aq_config_destroy(config);
    printf("%.4f s conversion and quantization\n", seconds);
    return 0;
}
