/* See tensors.h. */
#include "tensors.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/mem.h"
#include "job.h"

enum { MOST_SENTENCES = 20 };

/* A tensor and its place, so that equal ones stay in order. */
typedef struct row {
    const json_t *tensor;
    double cosine;
    size_t index;
} row;

static int by_cosine(const void *a, const void *b) {
    const row *x = a, *y = b;
    if (x->cosine != y->cosine) return x->cosine < y->cosine ? -1 : 1;
    return x->index < y->index ? -1 : 1;
}

void cli_print_tensors(const cli_args *args, const json_t *tensors, bool (*wanted)(const json_t *tensor), const char *align, const char *const *heading,
                       size_t most, void (*add_row)(cli_table *table, const json_t *tensor)) {
    size_t n = 0, i;
    const json_t *tensor;
    row *rows = aq_calloc(json_array_size(tensors), sizeof *rows);
    cli_table *table = cli_table_create(align);
    if (rows && table) {
        json_array_foreach(tensors, i, tensor) {
            if (wanted && !wanted(tensor)) continue;
            double cosine = cli_json_real(tensor, "cosine");
            rows[n] = (row){tensor, isnan(cosine) ? 2 : cosine, n};
            n++;
        }
        size_t shown = args->verbose || n <= most ? n : most;
        if (shown < n) qsort(rows, n, sizeof *rows, by_cosine);
        if (n > 0) cli_table_row(table, heading);
        for (i = 0; i < shown; i++) add_row(table, rows[i].tensor);
        cli_table_print(table);
        table = NULL;
        if (shown < n) cli_print(stdout, "%s... %zu more; -v shows all%s\n", cli_color_on(stdout, COLOR_DIM), n - shown, cli_color_off(stdout));
    }
    if (table) cli_table_print(table);
    aq_free(rows);
}

void cli_print_sentences(const cli_args *args, const json_t *list, const char *what) {
    size_t n = json_array_size(list), most = args->verbose || n <= MOST_SENTENCES ? n : MOST_SENTENCES;
    for (size_t i = 0; i < most; i++) {
        const char *text = json_string_value(json_array_get(list, i));
        cli_print(stdout, "%s: %s\n", what, cli_safe(text ? text : ""));
    }
    if (most < n) cli_print(stdout, "... %zu more; -v shows all\n", n - most);
}
