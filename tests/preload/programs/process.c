/* Processes, threads and descriptors. */
#include "hazards.h"
#include <grp.h>
#include <spawn.h>
#include <sys/epoll.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>

extern char **environ;

static void serve_all(int listener)
{
	for (;;) {
		int fd = accept_said(listener);
		if (fd >= 0)
			serve(fd, plain_read);
	}
}

static void fork_serve(void)
{
	int listener = listen_on(80);
	for (;;) {
		int fd = accept_said(listener);
		pid_t child = fork();
		if (child == 0) {
			close(listener);
			serve(fd, plain_read);
			_exit(7);
		}
		close(fd);
		int status;
		waitpid(child, &status, 0);
		say("child %d", WEXITSTATUS(status));
	}
}

static void run_and_read(int fd)
{
	char *const arguments[] = { "sh", "-c", "ls /proc/self/fd | wc -l >/dev/null; exit 5", NULL };
	int status;
	pid_t child = vfork();
	if (child == 0) {
		close(fd);
		execve("/bin/sh", arguments, environ);
		_exit(1);
	}
	waitpid(child, &status, 0);
	say("vfork and exec %d", WEXITSTATUS(status));
	if (posix_spawn(&child, "/bin/sh", NULL, NULL, arguments, environ) == 0)
		waitpid(child, &status, 0);
	say("posix_spawn %d", WEXITSTATUS(status));
}

static ssize_t read_after_spawn(int fd, char *buffer, size_t room)
{
	run_and_read(-1);
	return read(fd, buffer, room);
}

static void spawn(void)
{
	int listener = listen_on(80);
	for (;;) {
		int fd = accept_said(listener);
		/* After vfork the child's close acts on its own table, ours is the same memory. */
		run_and_read(fd);
		serve(fd, read_after_spawn);
	}
}

static void daemonized(void)
{
	if (fork() == 0) {
		int listener = listen_on(80);
		say("daemon %s", result(daemon(1, 1)));
		/* Nobody waits for it any more: the test ends it by its number. */
		char path[4096];
		snprintf(path, sizeof path, "%s.pid", output_path);
		FILE *file = fopen(path, "w");
		fprintf(file, "%d", getpid());
		fclose(file);
		alarm(60);
		serve_all(listener);
	}
	for (;;)
		pause();
}

static void set_user(void)
{
	int listener = listen_on(80);
	int result_of = setgroups(0, NULL) || setgid(65534) || setuid(65534);
	say("set user %s, now %d", result(result_of), getuid());
	serve_all(listener);
}

static int null_fd;
static volatile sig_atomic_t ticks;

static void on_tick(int signal)
{
	(void)signal;
	int before = errno;
	ticks++;
	if (write(null_fd, "x", 1) != 1 || close(dup(null_fd)) != 0)
		abort();
	close(-1);
	errno = before;
}

static void signals(void)
{
	struct sigaction act = { .sa_handler = on_tick, .sa_flags = SA_RESTART };
	struct itimerval every = { { 0, 300 }, { 0, 300 } };
	null_fd = open("/dev/null", O_WRONLY | O_CLOEXEC);
	int listener = listen_on(80);
	sigaction(SIGALRM, &act, NULL);
	setitimer(ITIMER_REAL, &every, NULL);
	serve_all(listener);
}

static void close_range_all(void)
{
	listen_on(80);
	say("close_range %s", result(close_range(3, ~0U, 0)));
	serve_all(listen_on(80));
}

static void closefrom_all(void)
{
	listen_on(80);
	closefrom(3);
	int listener = listen_on(80);
	say("the listener is %d", listener);
	serve_all(listener);
}

static void close_loop(void)
{
	listen_on(80);
	for (int fd = 3; fd < 2000; fd++)
		close(fd);
	int listener = listen_on(80);
	say("the listener is %d", listener);
	serve_all(listener);
}

static void numbers(void)
{
	int listener = listen_on(80);
	say("the listener is %d", listener);
	int fd = accept_said(listener);
	say("the connection is %d", fd);
	serve(fd, plain_read);
	serve_all(listener);
}

static ssize_t read_dups(int fd, char *buffer, size_t room)
{
	static int turn;
	int other = -1;
	switch (turn++ % 4) {
	case 0: other = dup(fd); break;
	case 1: other = dup2(fd, 150); break;
	case 2: other = fcntl(fd, F_DUPFD, 160); break;
	case 3: other = dup3(fd, 170, O_CLOEXEC); break;
	}
	/* The original goes, then the duplicate takes its place. */
	close(fd);
	ssize_t n = read(other, buffer, room);
	int error = errno;
	say("back on its number: %d", dup2(other, fd) == fd);
	close(other);
	errno = error;
	return n;
}

static ssize_t read_beside_dup(int fd, char *buffer, size_t room)
{
	int other = fcntl(fd, F_DUPFD_CLOEXEC, 0);
	say("close of a duplicate %s", result(close(other)));
	return read(fd, buffer, room);
}

static void dups(void)
{
	int listener = listen_on(80);
	for (;;) {
		serve(accept_said(listener), read_dups);
		serve(accept_said(listener), read_beside_dup);
	}
}

static int handed_pipe[2];

static void *writer(void *argument)
{
	char byte;
	int fd = *(int *)argument;
	while (read(handed_pipe[0], &byte, 1) == 1 && byte == 'r')
		say("write %s", result(respond(fd)));
	return NULL;
}

static void two_threads(void)
{
	int listener = listen_on(80);
	for (;;) {
		int fd = accept_said(listener);
		pthread_t thread;
		char buffer[4096];
		ssize_t n;
		if (pipe(handed_pipe))
			abort();
		pthread_create(&thread, NULL, writer, &fd);
		while ((n = read(fd, buffer, sizeof buffer)) > 0)
			if (write(handed_pipe[1], "r", 1) != 1)
				abort();
		if (write(handed_pipe[1], "e", 1) != 1)
			abort();
		pthread_join(thread, NULL);
		say("read %s", result(n));
		close(handed_pipe[0]), close(handed_pipe[1]), close(fd);
	}
}

static void *reads_and_answers(void *argument)
{
	char buffer[4096];
	while (read(*(int *)argument, buffer, sizeof buffer) > 0)
		respond(*(int *)argument);
	return NULL;
}

static void both_read(void)
{
	int listener = listen_on(80);
	for (;;) {
		int fd = accept_said(listener);
		pthread_t a, b;
		pthread_create(&a, NULL, reads_and_answers, &fd);
		pthread_create(&b, NULL, reads_and_answers, &fd);
		pthread_join(a, NULL);
		pthread_join(b, NULL);
		close(fd);
	}
}

static void *accepts(void *argument)
{
	serve_all(*(int *)argument);
	return NULL;
}

static void accept_threads(void)
{
	static int listener;
	pthread_t threads[4];
	listener = listen_on(80);
	for (int i = 0; i < 4; i++)
		pthread_create(&threads[i], NULL, accepts, &listener);
	pthread_join(threads[0], NULL);
}

static void put_rights(struct cmsghdr *header, const int *fds, int count)
{
	*header = (struct cmsghdr){ .cmsg_len = CMSG_LEN(count * sizeof *fds), .cmsg_level = SOL_SOCKET,
				    .cmsg_type = SCM_RIGHTS };
	memcpy(CMSG_DATA(header), fds, count * sizeof *fds);
}

static void send_fds(int channel, const int *fds, int count)
{
	char byte = 'x', control[CMSG_SPACE(8 * sizeof *fds)] = { 0 };
	struct iovec piece = { &byte, 1 };
	struct msghdr message = { .msg_iov = &piece, .msg_iovlen = 1, .msg_control = control,
				  .msg_controllen = CMSG_SPACE(count * sizeof *fds) };
	put_rights(CMSG_FIRSTHDR(&message), fds, count);
	say("sendmsg %s", result(sendmsg(channel, &message, 0)));
}

static void send_fd(int channel, int fd)
{
	send_fds(channel, &fd, 1);
}

static int receive_fd(int channel)
{
	int fd;
	char byte, control[CMSG_SPACE(sizeof fd)];
	struct iovec piece = { &byte, 1 };
	struct msghdr message = { .msg_iov = &piece, .msg_iovlen = 1, .msg_control = control,
				  .msg_controllen = sizeof control };
	say("recvmsg %s", result(recvmsg(channel, &message, 0)));
	memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof fd);
	return fd;
}

/* Connections are served by another process. */
static void pass(void)
{
	int pair[2], listener = listen_on(80);
	if (socketpair(AF_UNIX, SOCK_STREAM, 0, pair))
		abort();
	if (fork() == 0) {
		close(listener);
		for (;;)
			serve(receive_fd(pair[1]), plain_read);
	}
	for (;;) {
		int fd = accept_said(listener);
		send_fd(pair[0], fd);
		close(fd);
	}
}

/* Serves connections that another process has got, too, and may do anything with; `pass_on` gives it to that one. */
static void serve_passed(void (*pass_on)(int channel, int fd))
{
	int pair[2], listener = listen_on(80);
	if (socketpair(AF_UNIX, SOCK_STREAM, 0, pair))
		abort();
	if (fork() == 0) {
		close(listener);
		for (;;)
			pause();
	}
	for (;;) {
		int fd = accept_said(listener);
		pass_on(pair[0], fd);
		serve(fd, plain_read);
	}
}

static void second(int channel, int fd)
{
	const int fds[] = { 2, fd };
	send_fds(channel, fds, 2);
}

/* Credentials come first. */
static void in_second_part(int channel, int fd)
{
	char byte = 'x', control[CMSG_SPACE(sizeof(struct ucred)) + CMSG_SPACE(sizeof fd)] = { 0 };
	struct ucred self = { getpid(), getuid(), getgid() };
	struct iovec piece = { &byte, 1 };
	struct msghdr message = { .msg_iov = &piece, .msg_iovlen = 1, .msg_control = control,
				  .msg_controllen = sizeof control };
	struct cmsghdr *header = CMSG_FIRSTHDR(&message);
	*header = (struct cmsghdr){ .cmsg_len = CMSG_LEN(sizeof self), .cmsg_level = SOL_SOCKET,
				    .cmsg_type = SCM_CREDENTIALS };
	memcpy(CMSG_DATA(header), &self, sizeof self);
	put_rights(CMSG_NXTHDR(&message, header), &fd, 1);
	say("sendmsg %s", result(sendmsg(channel, &message, 0)));
}

/* By sendmmsg, in the second message. */
static void many(int channel, int fd)
{
	char byte = 'x', control[CMSG_SPACE(sizeof fd)] = { 0 };
	struct iovec piece = { &byte, 1 };
	struct mmsghdr messages[2] = { { .msg_hdr = { .msg_iov = &piece, .msg_iovlen = 1 } },
				       { .msg_hdr = { .msg_iov = &piece, .msg_iovlen = 1, .msg_control = control,
						      .msg_controllen = sizeof control } } };
	put_rights(CMSG_FIRSTHDR(&messages[1].msg_hdr), &fd, 1);
	say("sendmmsg %s", result(sendmmsg(channel, messages, 2, 0)));
}

static void pass_second(void) { serve_passed(second); }
static void pass_in_second_part(void) { serve_passed(in_second_part); }
static void pass_many(void) { serve_passed(many); }

/* The listening socket itself comes from another process, or from before an exec. */
static void passed_listener(void)
{
	int pair[2];
	if (socketpair(AF_UNIX, SOCK_STREAM, 0, pair))
		abort();
	if (fork() == 0)
		serve_all(receive_fd(pair[1]));
	/* Made by system calls that nobody sees. */
	send_fd(pair[0], listen_on(80));
	for (;;)
		pause();
}

static void inherited_listener(void)
{
	if (getenv("LISTENER"))
		serve_all(atoi(getenv("LISTENER")));
	char text[16];
	snprintf(text, sizeof text, "%d", listen_on(80));
	setenv("LISTENER", text, 1);
	execl("/proc/self/exe", "hazards", "inherited_listener", output_path, NULL);
}

static void ring(void)
{
	char parameters[120] = { 0 };
	int listener = listen_on(80), fd = accept_said(listener);
	for (int i = 0; i < 3; i++) {
		memset(parameters, 0, sizeof parameters);
		long made = syscall(SYS_io_uring_setup, 4, parameters);
		say("io_uring_setup %s", made < 0 ? result(made) : "a ring");
	}
	serve(fd, plain_read);
	serve_all(listener);
}

const struct hazard process_hazards[] = {
	{ "fork_serve", fork_serve }, { "spawn", spawn }, { "daemon", daemonized }, { "set_user", set_user },
	{ "signals", signals }, { "close_range", close_range_all }, { "closefrom", closefrom_all },
	{ "close_loop", close_loop }, { "numbers", numbers }, { "dups", dups }, { "two_threads", two_threads },
	{ "both_read", both_read }, { "accept_threads", accept_threads }, { "pass", pass },
	{ "pass_second", pass_second }, { "pass_in_second_part", pass_in_second_part }, { "pass_many", pass_many },
	{ "passed_listener", passed_listener }, { "inherited_listener", inherited_listener }, { "ring", ring },
	{ NULL, NULL },
};
