/* The parsed command line, and what every command shares: running with it. */
#ifndef CLI_ARGS_H
#define CLI_ARGS_H

#include <arrowquant/base.h>

#include "options.h"

typedef struct cli_setting {
    const cli_option *option;
    const char *value; /* NULL: a switch */
} cli_setting;

typedef struct cli_args {
    const cli_command *command; /* NULL: none was named */
    cli_setting *settings;      /* in the order given */
    size_t n_settings;
    const char **operands;
    size_t n_operands;
    bool help, version; /* -h, --version */
    bool json, quiet;
    int verbose;
} cli_args;

/* Parses argv. The words of argv are borrowed. AQ_ERR_USAGE with a suggestion. cli_args_free in any case. */
aq_status cli_args_parse(cli_args *args, int argc, char **argv, aq_error *err);
void cli_args_free(cli_args *args);

bool cli_args_has(const cli_args *args, const char *name);
/* Last value given, NULL when there is none. */
const char *cli_args_value(const cli_args *args, const char *name);

/* "6.5GB" (10^9), "4GiB" (2^30), "300 MB", "128k"; a unit is needed, so that nobody has to guess one. AQ_ERR_USAGE. */
aq_status cli_parse_size(uint64_t *out, const char *text, const char *option, aq_error *err);
/* Digits only. */
aq_status cli_parse_count(uint64_t *out, const char *text, const char *option, aq_error *err);

/* Commands. Each returns an exit code. */
int cli_run_inspect(const cli_args *args);
int cli_run_quantize(const cli_args *args);
int cli_run_plan(const cli_args *args);
int cli_run_verify(const cli_args *args);
int cli_run_diff(const cli_args *args);
int cli_run_export(const cli_args *args);
int cli_run_report(const cli_args *args);
int cli_run_bench(const cli_args *args);
int cli_run_calib(const cli_args *args);
int cli_run_version(const cli_args *args);
int cli_run_help(const cli_args *args);
int cli_run_completion(const cli_args *args);

/* `arrowquant` alone. */
int cli_print_overview(const cli_args *args);
/* Help of one command, or of all when NULL. */
int cli_print_help(const cli_args *args, const cli_command *command);

#endif
