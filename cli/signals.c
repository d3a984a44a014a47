/* See signals.h. Handlers only set a flag, write fixed text and leave: everything else is unsafe in them. */
#include "signals.h"

#include <signal.h>
#include <stddef.h>
#include <unistd.h>

static volatile sig_atomic_t received;
static bool as_json;

static void on_interrupt(int number) {
    if (received) _exit(128 + number);
    received = number;
}

/* A page of a map has no file behind it any more: the file was cut after it was checked. No result exists under its final name at this point. */
static void on_bus_error(int number) {
    (void)number;
    static const char text[] = "error: an input file became shorter or unreadable while it was read\n"
                               "  hint: leave the file alone while arrowquant runs; on a network drive, copy it to a local disk first\n";
    static const char json[] = "{\"error\":{\"code\":3,\"kind\":\"format\",\"message\":\"an input file became shorter or unreadable while it was read\","
                               "\"file\":\"\",\"tensor\":\"\",\"hint\":\"leave the file alone while arrowquant runs\"}}\n";
    ssize_t n = as_json ? write(STDOUT_FILENO, json, sizeof json - 1) : write(STDERR_FILENO, text, sizeof text - 1);
    (void)n;
    _exit(3);
}

void cli_signals_guard_maps(bool json) {
    as_json = json;
    struct sigaction action = {.sa_handler = on_bus_error};
    sigemptyset(&action.sa_mask);
    sigaction(SIGBUS, &action, NULL);
}

void cli_signals_catch_interrupts(void) {
    static const int numbers[] = {SIGINT, SIGTERM};
    for (size_t i = 0; i < 2; i++) {
        /* Reads and writes go on: only the progress hook stops the job. */
        struct sigaction action = {.sa_handler = on_interrupt, .sa_flags = SA_RESTART}, before;
        sigemptyset(&action.sa_mask);
        /* Started in the background of a script or under nohup: what was ignored stays ignored. */
        if (sigaction(numbers[i], NULL, &before) == 0 && before.sa_handler == SIG_IGN) continue;
        sigaction(numbers[i], &action, NULL);
    }
}

int cli_signal_received(void) { return received; }
