/* A folder of recordings, each under the hash of all that it follows from. The key stands inside the file too: an entry that was renamed or copied in from
 * another cache is told from its own (FA14). */
#include <errno.h>
#include <openssl/evp.h>
#include <stdio.h>
#include <string.h>

#include "base/file.h"
#include "base/mem.h"
#include "calibration/file.h"

static bool add(EVP_MD_CTX *hash, const char *name, const char *value) {
    return EVP_DigestUpdate(hash, name, strlen(name) + 1) == 1 && EVP_DigestUpdate(hash, value ? value : "", value ? strlen(value) + 1 : 1) == 1;
}

static aq_status add_all(EVP_MD_CTX *hash, const aq_model *model, const char *data_sha256, const aq_calib_options *options, const char *extra, aq_error *err) {
    bool ok = EVP_DigestInit_ex(hash, EVP_sha256(), NULL) == 1 && add(hash, "version", AQ_VERSION " " AQ_CALIB_SCHEMA_VERSION);
    for (size_t i = 0; ok && model && i < aq_model_n_files(model); i++) {
        char digest[65];
        aq_status status = aq_file_sha256(aq_model_file(model, i), digest, err);
        if (status != AQ_OK) return status;
        ok = add(hash, "model", digest);
    }
    ok = ok && add(hash, "data", data_sha256) && add(hash, "extra", extra);
    aq_calib_keys keys;
    if (options) aq_calib_keys_fill(&keys, options);
    for (int i = 0; ok && options && i < AQ_CALIB_N_KEYS; i++) ok = add(hash, keys.key[i], keys.value[i]);
    return ok ? AQ_OK : aq_fail_memory(err, 1, "a hash");
}

aq_status aq_calib_cache_key(const aq_model *model, const char *data_sha256, const aq_calib_options *options, const char *extra, char out[65], aq_error *err) {
    aq_error_clear(err);
    unsigned char bytes[32];
    unsigned size = 0;
    EVP_MD_CTX *hash = EVP_MD_CTX_new();
    aq_status status = hash ? add_all(hash, model, data_sha256, options, extra, err) : aq_fail_memory(err, 1, "a hash");
    if (status == AQ_OK && EVP_DigestFinal_ex(hash, bytes, &size) != 1) status = aq_fail_memory(err, 1, "a hash");
    EVP_MD_CTX_free(hash);
    for (unsigned i = 0; status == AQ_OK && i < size; i++) snprintf(out + 2 * (size_t)i, 3, "%02x", bytes[i]);
    return status;
}

/* FOLDER/KEY.aqcal. The key is no path: 64 hex digits. */
static aq_status entry_path(char **out, const char *folder, const char *key, aq_error *err) {
    char name[80];
    *out = NULL;
    if (strlen(key) != 64 || strspn(key, "0123456789abcdef") != 64) return aq_fail(err, AQ_ERR_USAGE, "the key of a cache is not 64 hex digits");
    snprintf(name, sizeof name, "%s.aqcal", key);
    *out = aq_path_join(folder, name);
    return *out ? AQ_OK : aq_fail_memory(err, 80, "a path");
}

aq_status aq_calib_cache_find(aq_calib **out, const char *folder, const char *key, aq_error *err) {
    aq_error_clear(err);
    *out = NULL;
    char *path;
    aq_status status = entry_path(&path, folder, key, err);
    if (status == AQ_OK && aq_path_exists(path)) {
        status = aq_calib_open(out, path, err);
        if (status == AQ_OK) status = aq_calib_verify(*out, err);
        if (status == AQ_OK && strcmp((*out)->cache_key, key) != 0)
            status = aq_fail_at(err, AQ_ERR_FORMAT, path, NULL, "is foreign: it was not made from this model, these data and these options");
        if (status != AQ_OK) {
            aq_calib_free(*out);
            *out = NULL;
            aq_hint(err, "remove the entry; it is made anew then");
        }
    }
    aq_free(path);
    return status;
}

aq_status aq_calib_cache_store(const aq_calib *calib, const char *folder, const char *key, aq_error *err) {
    aq_error_clear(err);
    char *path;
    aq_status status = entry_path(&path, folder, key, err);
    if (status == AQ_OK) status = aq_make_dirs(folder, err);
    if (status == AQ_OK) status = aq_calib_save_keyed(calib, path, true, key, err);
    aq_free(path);
    return status;
}
