/* One weights file of a model, safetensors or GGUF: opened, its header read into owned memory, checked, its data mapped.
 *
 * Tensors are read with pread, not through the map: a file that shrinks meanwhile is then an error and not a SIGBUS, and resident memory does not grow
 * with what was read. Each read opens the file again and compares it with what was seen first, so no descriptor is held.
 */
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/error.h"
#include "base/mem.h"
#include "model/gguf.h"
#include "model/internal.h"

static bool take_stamp(aq_file_stamp *out, int fd) {
    struct stat st;
    if (fstat(fd, &st) != 0) return false;
    *out = (aq_file_stamp){(uint64_t)st.st_dev, (uint64_t)st.st_ino, (uint64_t)st.st_size, (int64_t)st.st_mtim.tv_sec * 1000000000 + st.st_mtim.tv_nsec};
    return true;
}

/* What a file that is no safetensors file seems to be, by its first bytes; NULL when that can't be told. */
static const char *kind_of(const unsigned char *magic) {
    if (memcmp(magic, "PAR1", 4) == 0) return "a Parquet file";
    if (memcmp(magic, "PK\x03\x04", 4) == 0) return "a zip file, as torch.save writes (pickle is never read; convert first)";
    if (magic[0] == 0x80 && magic[1] <= 5) return "a pickle (pickle is never read; convert first)";
    if (memcmp(magic, "version ", 8) == 0) return "a Git LFS pointer: the download is not complete";
    return NULL;
}

/* Length of the JSON, checked against the file and the limit before anything is allocated (ST01, ST02). */
static aq_status read_length(uint64_t *n, const aq_weights_file *file, const aq_model_options *options, aq_error *err) {
    unsigned char head[9] = {0};
    char length[32], size[32];
    if (file->map.size < 8)
        return aq_fail_at(err, AQ_ERR_FORMAT, file->path, NULL,
                          "is %d bytes long, too short for a safetensors file, which begins with 8 bytes of header length", (int)file->map.size);
    aq_status status = aq_file_pread(file->map.fd, head, file->map.size < sizeof head ? file->map.size : sizeof head, 0, file->path, err);
    if (status != AQ_OK) return status;
    *n = 0;
    for (int i = 7; i >= 0; i--) *n = *n << 8 | head[i];
    const char *kind = kind_of(head);
    aq_format_count(length, *n);
    if (*n > file->map.size - 8) {
        aq_fail_at(err, AQ_ERR_FORMAT, file->path, NULL, "the header length is %s bytes, but the file has only %s", length,
                   aq_format_count(size, file->map.size));
        if (kind)
            aq_hint(err, "it seems to be %s", kind);
        else
            aq_hint(err, "if this is a safetensors file, it is cut short: get it again");
        return AQ_ERR_FORMAT;
    }
    if (*n == 0) return aq_fail_at(err, AQ_ERR_FORMAT, file->path, NULL, "the header length is 0");
    if (*n > options->limits.header_bytes)
        return aq_fail_limit(err, file->path, NULL, "header_bytes", options->limits.header_bytes, "the header length is %s bytes", length);
    if (head[8] != '{') return aq_fail_at(err, AQ_ERR_FORMAT, file->path, NULL, "at byte 8: a safetensors header begins with '{', found byte 0x%02x", head[8]);
    return AQ_OK;
}

/* Adds a piece to a hash that is taken piece by piece: the hash of the hash so far and the piece's. */
static void hash_piece(char hash[33], const void *piece, uint64_t n) {
    char both[64] = {0};
    memcpy(both, hash, strlen(hash));
    aq_xxh3_hex(piece, n, hash);
    memcpy(both + 32, hash, 32);
    aq_xxh3_hex(both, sizeof both, hash);
}

aq_status aq_text_read(void *context, uint64_t offset, char *to, uint64_t n, aq_error *err) {
    const aq_text_reader *reader = context;
    aq_status status = aq_file_pread(reader->fd, to, n, reader->begin + offset, reader->path, err);
    if (status == AQ_OK) hash_piece(reader->hash, to, n);
    return status;
}

/* A file called .gguf, or one that begins like one whatever it is called. */
static bool is_gguf(const aq_weights_file *file) {
    char magic[4];
    if (aq_text_ends_with(file->path, ".gguf")) return true;
    return file->map.size >= sizeof magic && aq_file_pread(file->map.fd, magic, sizeof magic, 0, file->path, NULL) == AQ_OK && memcmp(magic, "GGUF", 4) == 0;
}

static aq_status hash_header(const aq_weights_file *file, int fd, char *piece, char hash[33], aq_error *err);

static aq_status open_gguf(aq_weights_file *file, const aq_model_options *options, aq_error *err) {
    char *piece = aq_alloc(AQ_SCAN_PIECE_BYTES);
    if (!piece) return aq_fail_memory(err, AQ_SCAN_PIECE_BYTES, file->path);
    aq_status status = aq_gguf_parse(&file->header, file->map.fd, file->map.size, file->path, options, &file->header_bytes, err);
    if (status == AQ_OK) status = hash_header(file, file->map.fd, piece, file->header_hash, err);
    aq_free(piece);
    return status;
}

static aq_status open_file(aq_weights_file *file, const aq_model_options *options, aq_error *err) {
    uint64_t n = 0;
    aq_status status = aq_file_map_open(&file->map, file->path, options->no_follow_symlinks, err);
    if (status != AQ_OK) return status;
    if (!take_stamp(&file->stamp, file->map.fd)) return aq_fail_at(err, AQ_ERR_IO, file->path, NULL, "cannot read its size");
    if (is_gguf(file)) return open_gguf(file, options, err);
    if ((status = read_length(&n, file, options, err)) != AQ_OK) return status;
    file->header_bytes = 8 + n;
    char *text = aq_alloc(n);
    if (!text) return aq_fail_memory(err, n, file->path);
    char length[8];
    aq_text_reader reader = {file->map.fd, 0, file->path, file->header_hash};
    status = aq_text_read(&reader, 0, length, sizeof length, err); /* for the hash */
    reader.begin = sizeof length;
    if (status != AQ_OK) {
        aq_free(text);
        return status;
    }
    aq_scan_source source = {aq_text_read, &reader};
    return aq_st_parse(&file->header, text, n, &source, file->map.size, file->path, options, err);
}

aq_status aq_model_add_file(aq_model *model, char *path, const aq_model_options *options, aq_error *err) {
    aq_weights_file *files = path ? aq_grow(model->files, &model->files_capacity, model->n_files, sizeof *files) : NULL;
    if (!files) {
        aq_free(path);
        return aq_fail_memory(err, sizeof *files, "a list of files");
    }
    model->files = files;
    aq_weights_file *file = &files[model->n_files++];
    memset(file, 0, sizeof *file);
    file->map.fd = -1;
    file->path = path;
    aq_status status = open_file(file, options, err);
    if (file->map.fd >= 0) close(file->map.fd);
    file->map.fd = -1;
    for (size_t i = 0; status == AQ_OK && i < file->header.n_tensors; i++) file->header.tensors[i].file_index = (uint32_t)(model->n_files - 1);
    if (status == AQ_OK && file->header.unknown_fields.n > 0)
        status = aq_model_warn(model, err, path, "%zu tensors have fields that the format does not define; they are ignored: %s", file->header.unknown_fields.n,
                               aq_name_list_text(&file->header.unknown_fields));
    if (status == AQ_OK && file->header.unknown_dtypes.n > 0)
        status = aq_model_warn(model, err, path, "%zu tensors of unknown dtype are copied as they are: %s", file->header.unknown_dtypes.n,
                               aq_name_list_text(&file->header.unknown_dtypes));
    return status;
}

aq_status aq_model_add_stamp(aq_model *model, const char *path, aq_error *err) {
    aq_weights_file *files = aq_grow(model->files, &model->files_capacity, model->n_files, sizeof *files);
    if (!files) return aq_fail_memory(err, sizeof *files, "a list of files");
    model->files = files;
    aq_weights_file *file = &files[model->n_files++];
    memset(file, 0, sizeof *file);
    file->map.fd = -1;
    if (!(file->path = aq_strdup(path))) return aq_fail_memory(err, strlen(path), "a path");
    int fd = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC | O_NOCTTY);
    bool taken = fd >= 0 && take_stamp(&file->stamp, fd);
    int error = errno;
    if (fd >= 0) close(fd);
    return taken ? AQ_OK : aq_fail_io(err, error, path, "cannot open");
}

void aq_weights_file_free(aq_weights_file *file) {
    aq_file_map_close(&file->map);
    aq_st_header_free(&file->header);
    aq_free(file->path);
}

aq_status aq_weights_file_reopen(int *fd, const aq_weights_file *file, aq_error *err) {
    aq_file_stamp now;
    *fd = open(file->path, O_RDONLY | O_NONBLOCK | O_CLOEXEC | O_NOCTTY);
    bool same = *fd >= 0 && take_stamp(&now, *fd) && now.device == file->stamp.device && now.inode == file->stamp.inode && now.size == file->stamp.size &&
                now.mtime_ns == file->stamp.mtime_ns;
    if (same) return AQ_OK;
    if (*fd >= 0) close(*fd);
    *fd = -1;
    aq_fail_at(err, AQ_ERR_FORMAT, file->path, NULL, "changed during read: it is not the file that was opened, or its size or modification time differ");
    aq_hint(err, "start again when nothing writes to the model any more");
    return AQ_ERR_FORMAT;
}

void aq_weights_file_done(int fd) { close(fd); }

aq_status aq_weights_file_read(const aq_weights_file *file, uint64_t offset, void *out, uint64_t size, aq_error *err) {
    int fd;
    aq_status status = aq_weights_file_reopen(&fd, file, err);
    if (status != AQ_OK) return status;
    status = aq_file_pread(fd, out, size, offset, file->path, err);
    close(fd);
    return status;
}

/* Hashes the header in the pieces in which a safetensors header is read first. */
static aq_status hash_header(const aq_weights_file *file, int fd, char *piece, char hash[33], aq_error *err) {
    aq_text_reader reader = {fd, 0, file->path, hash};
    aq_status status = aq_text_read(&reader, 0, piece, 8, err);
    for (uint64_t at = 8, n; at < file->header_bytes && status == AQ_OK; at += n) {
        n = file->header_bytes - at < AQ_SCAN_PIECE_BYTES ? file->header_bytes - at : AQ_SCAN_PIECE_BYTES;
        status = aq_text_read(&reader, at, piece, n, err);
    }
    return status;
}

static aq_status check_header(const aq_weights_file *file, char *piece, aq_error *err) {
    char hash[33] = "";
    int fd;
    aq_status status = aq_weights_file_reopen(&fd, file, err);
    if (status != AQ_OK) return status;
    if (file->header_bytes > 0) status = hash_header(file, fd, piece, hash, err); /* none of a file that another room reads */
    close(fd);
    if (status == AQ_OK && strcmp(hash, file->header_hash) != 0)
        return aq_fail_at(err, AQ_ERR_FORMAT, file->path, NULL, "changed during read: its header differs");
    return status;
}

aq_status aq_model_check_unchanged(const aq_model *model, aq_error *err) {
    char *piece = aq_alloc(AQ_SCAN_PIECE_BYTES);
    if (!piece) return aq_fail_memory(err, AQ_SCAN_PIECE_BYTES, "checking the files");
    aq_status status = AQ_OK;
    for (size_t i = 0; i < model->n_files && status == AQ_OK; i++) status = check_header(&model->files[i], piece, err);
    aq_free(piece);
    for (size_t i = 0; i < aq_model_n_adapters(model) && status == AQ_OK; i++) status = aq_model_check_unchanged(aq_lora_model(model, i), err);
    return status;
}
