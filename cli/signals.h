/* Signals: SIGINT and SIGTERM ask a job to stop, a second one stops the program at once; SIGBUS means that a mapped input file became shorter. */
#ifndef CLI_SIGNALS_H
#define CLI_SIGNALS_H

#include <stdbool.h>

/* For every command. json: the failure is told as an object on stdout. */
void cli_signals_guard_maps(bool json);
/* For jobs whose progress hook looks at cli_signal_received. */
void cli_signals_catch_interrupts(void);
/* Number of the first signal that asked to stop, 0 when there was none. */
int cli_signal_received(void);

#endif
