/* The program `arrowquant`: parses the command line, runs one command, returns its exit code (aq_status; see docs/cli.md). */
#include <signal.h>
#include <stdlib.h>

#include "args.h"
#include "kernels/kernels.h"
#include "log.h"
#include "signals.h"
#include "term.h"

static int run(const cli_args *args) {
    if (args->version) return cli_run_version(args);
    if (args->help) return cli_print_help(args, args->command);
    if (!args->command) return cli_print_overview(args);
    aq_error err;
    if (cli_log_start(args, &err) || aq_kernels_select(NULL, &err)) return cli_report_error(&err, args->json, NULL);
    cli_signals_guard_maps(args->json);
    return args->command->run(args);
}

int main(int argc, char **argv) {
    cli_streams_open();
    /* A closed pipe ends the output (cli_finish), not a job of hours whose progress somebody stopped reading. */
    signal(SIGPIPE, SIG_IGN);
    cli_args args;
    aq_error err;
    aq_error_clear(&err);
    aq_status status = cli_args_parse(&args, argc, argv, &err);
    cli_term_init(cli_args_value(&args, "color"));
    int code = status ? cli_report_error(&err, args.json, NULL) : run(&args);
    cli_args_free(&args);
    return cli_finish(code);
}
