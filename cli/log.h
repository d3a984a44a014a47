/* What goes to stderr while a job runs: progress, notes and warnings; and the file of --log, which gets all of it. */
#ifndef CLI_LOG_H
#define CLI_LOG_H

#include <arrowquant/pipeline.h>

#include "args.h"

/* Reads --progress, -q, -v and opens --log. AQ_ERR_IO, AQ_ERR_USAGE (the file is one of the inputs). */
aq_status cli_log_start(const cli_args *args, aq_error *err);
/* One line to the log file only. */
void cli_log_write(aq_log_level level, const char *message);
/* One line to stderr, as its level and -q/-v want, and to the log file. */
void cli_log(aq_log_level level, const char *message);
/* Ends the progress display. */
void cli_log_end_progress(void);
/* Hooks that show progress and notes, and cancel after a signal. */
const aq_job_hooks *cli_job_hooks(void);

#endif
