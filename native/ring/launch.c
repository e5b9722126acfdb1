/* Start a program, but hold it before its execve until the recorder is ready.
 *
 * In C because between fork and execve of a threaded process only async-signal-safe calls are allowed. The child
 * keeps terminal, process group, session, descriptors, limits and environment as they are: the program must not
 * notice that it is recorded.
 */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <unistd.h>

#include "../pagelens.h"

/* Forks; the child waits for one byte on a pipe, then executes path. Returns the pid, or -errno. go: descriptor to
 * write the byte to (closing it unwritten ends the child with 125). err: descriptor that gives an int errno when
 * execve fails, else end of file. */
PL_EXPORT int pl_launch(const char *path, char *const argv[], char *const envp[], int *go, int *err);
PL_EXPORT int pl_launch(const char *path, char *const argv[], char *const envp[], int *go, int *err)
{
	static const int restored[] = { SIGPIPE, SIGXFSZ };     /* the ones that Python ignores */
	int start[2], fail[2];
	pid_t pid;

	if (pipe2(start, O_CLOEXEC))
		return -errno;
	if (pipe2(fail, O_CLOEXEC)) {
		int error = errno;

		close(start[0]);
		close(start[1]);
		return -error;
	}
	pid = fork();
	if (pid == 0) {
		char byte;
		int error;
		ssize_t n;

		close(start[1]);
		for (unsigned int i = 0; i < sizeof(restored) / sizeof(*restored); i++)
			signal(restored[i], SIG_DFL);
		do
			n = read(start[0], &byte, 1);
		while (n < 0 && errno == EINTR);
		if (n != 1)
			_exit(125);
		execve(path, argv, envp);
		error = errno;
		if (error == ENOEXEC) {
			/* A script without "#!": what execvp and every shell do. */
			char *shell[1026];
			unsigned int i;

			shell[0] = (char[]){ "/bin/sh" };
			shell[1] = (char *)(uintptr_t)path;
			for (i = 1; i < 1024 && argv[0] && argv[i]; i++)
				shell[i + 1] = argv[i];
			shell[i + 1] = NULL;
			execve("/bin/sh", shell, envp);
			error = errno;
		}
		n = write(fail[1], &error, sizeof(error));
		(void)n;
		_exit(error == ENOENT || error == ENOTDIR ? 127 : 126);
	}
	if (pid < 0) {
		int error = errno;

		close(start[0]);
		close(start[1]);
		close(fail[0]);
		close(fail[1]);
		return -error;
	}
	close(start[0]);
	close(fail[1]);
	*go = start[1];
	*err = fail[0];
	return pid;
}
