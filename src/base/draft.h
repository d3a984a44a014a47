/* A file in the making: written beside its target under another name, and renamed when it is whole. */
#ifndef AQ_BASE_DRAFT_H
#define AQ_BASE_DRAFT_H

#include "base/error.h"

typedef struct aq_draft {
    char *path; /* the target */
    char *temp; /* `PATH.partial-<pid>`: what is written; the caller creates it */
    bool overwrite;
} aq_draft;

/* AQ_ERR_IO when a file cannot become `path`: it is a folder, it is there and `overwrite` is not set, or the folder it should lie in is missing. Asked
 * before the work whose result the file is to hold, too. */
aq_status aq_draft_check(const char *path, bool overwrite, aq_error *err);
/* Checks, and sets the names. */
aq_status aq_draft_begin(aq_draft *draft, const char *path, bool overwrite, aq_error *err);
/* Syncs the written file, gives it its name, syncs the folder. Without `overwrite` a target that has appeared since is left alone. */
aq_status aq_draft_commit(aq_draft *draft, aq_error *err);
/* Removes what was not committed and frees; may be called in any state. */
void aq_draft_end(aq_draft *draft);

#endif
