/* The work folder of a writing run: `OUT.partial-<pid>` beside the target, mode 0700, with `lock`, `journal` and `out/`, the future target.
 * Only one live run may write a target; the folder of a dead run is adopted when it did the same work, and never mixed otherwise. */
#ifndef AQ_STORE_WORKDIR_H
#define AQ_STORE_WORKDIR_H

#include "store/journal.h"

typedef struct aq_workdir {
    char *target; /* without trailing slashes */
    char *parent;
    char *path;  /* the work folder */
    char *out;   /* its out/ */
    int lock_fd; /* holds the lock while open */
    bool resumed;
} aq_workdir;

/* Finds, adopts or creates the work folder and its journal. `overwrite` lets the target exist. */
aq_status aq_workdir_open(aq_workdir *dir, aq_journal *journal, const char *target, const char *fingerprint, bool overwrite, bool make_parents, bool restart,
                          aq_error *err);
/* Moves out/ to the target and removes the rest. */
aq_status aq_workdir_commit(aq_workdir *dir, bool overwrite, aq_error *err);
/* Releases the lock; removes the folder unless keep. */
void aq_workdir_close(aq_workdir *dir, bool keep);

#endif
