/* `arrowquant bench`. */
#include <arrowquant/pipeline.h>

#include "job.h"
#include "log.h"
#include "settings.h"
#include "signals.h"
#include "term.h"

static void print_bench(const cli_args *args, const json_t *report) {
    static const char *const heading[] = {"kernels", "codes", "to F32 GB/s", "x memcpy", "1 row GFLOP/s", "x F32", "64 rows GFLOP/s", "x F32"};
    cli_table *table = cli_table_create("llrrrrrr");
    size_t i;
    const json_t *entry;
    if (args->quiet || !table) return;
    cli_table_row(table, heading);
    json_array_foreach(json_object_get(report, "kernels"), i, entry) {
        const json_t *one = json_object_get(entry, "linear_1"), *many = json_object_get(entry, "linear_64");
        char codes[64];
        snprintf(codes, sizeof codes, "int%d g%d %s", (int)cli_json_count(entry, "bits"), (int)cli_json_count(entry, "group_size"),
                 cli_json_text(entry, "params"));
        const char *cells[] = {cli_json_text(entry, "isa"),
                               codes,
                               cli_short(cli_json_real(entry, "dequantize_gb_s")),
                               cli_short(cli_json_real(entry, "of_memcpy")),
                               cli_short(cli_json_real(one, "gflop_s")),
                               cli_short(cli_json_real(one, "of_f32")),
                               cli_short(cli_json_real(many, "gflop_s")),
                               cli_short(cli_json_real(many, "of_f32"))};
        cli_table_row(table, cells);
    }
    cli_table_print(table);
    cli_print(stdout, "memcpy %s GB/s; products of [rows, %llu] with weights [%llu, %llu]; this machine uses %s\n",
              cli_short(cli_json_real(report, "memcpy_gb_s")), (unsigned long long)cli_json_count(report, "cols"),
              (unsigned long long)cli_json_count(report, "rows"), (unsigned long long)cli_json_count(report, "cols"), cli_json_text(report, "isa"));
}

int cli_run_bench(const cli_args *args) {
    aq_error err;
    aq_error_clear(&err);
    aq_config *config = NULL;
    char *report = NULL;
    if (cli_settings_config(&config, args, &err) == AQ_OK) {
        cli_signals_catch_interrupts();
        aq_bench((int)aq_config_int(config, "num_threads", 0), cli_job_hooks(), &report, &err);
    }
    aq_config_destroy(config);
    return cli_job_end(args, &err, report, print_bench);
}
