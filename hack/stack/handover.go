package stack

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"syscall"
)

// operation is what is done in a stack's directory.
type operation string

const (
	opCheck   operation = "check" // whether the operation For can be done
	opUp      operation = "up"
	opRestart operation = "restart"
	opDown    operation = "down"
	opPurge   operation = "purge"
	opStatus  operation = "status"
)

// call is one operation. Root has a process of the stack's user do it.
type call struct {
	Op, For operation
	Options Options

	// What the process must know of root's.
	Dir, Bin string
	Account  account
}

// answer is what came of it.
type answer struct {
	Status  Status
	Removed []string
	Up      bool   // it is ErrUp that it failed with
	Error   string // or this
}

// processName, as argument 0, makes a process the one that acts for root.
const processName = "berth-stack"

// The process is this program again, as whom it is to act, before its own main runs. A program that imports the package is ready
// for that.
func init() {
	if os.Args[0] != processName {
		return
	}
	if err := serve(os.Stdin, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, processName+":", err)
		os.Exit(1)
	}
	os.Exit(0)
}

// act does the operation as the stack's user. log is what an Up or a Restart writes to.
func (s *Stack) act(ctx context.Context, c call, log *os.File) (answer, error) {
	if os.Getuid() != 0 {
		return s.do(ctx, c, log, c.Options.Progress)
	}
	if _, err := os.Stat(s.account.Home); err != nil {
		return answer{}, fmt.Errorf("the home of user %s: %w", s.User(), err)
	}
	c.Dir, c.Bin, c.Account = s.Dir, s.bin, s.account
	in, err := json.Marshal(c)
	if err != nil {
		return answer{}, err
	}
	var out bytes.Buffer
	// A file that only root may execute can be run so: it is root who does, until serve.
	cmd := &exec.Cmd{
		Path: "/proc/self/exe", Args: []string{processName}, Dir: "/",
		Stdout: &out, Stderr: c.Options.Progress,
		Env: []string{"HOME=" + s.account.Home, "USER=" + s.User(), "LOGNAME=" + s.User(), "PATH=" + systemPath},
		// A Ctrl-C at the terminal is for us, who pass it on.
		SysProcAttr: &syscall.SysProcAttr{Setsid: true},
	}
	if log != nil {
		cmd.ExtraFiles = []*os.File{log}
	}
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return answer{}, err
	}
	if err := cmd.Start(); err != nil {
		return answer{}, fmt.Errorf("act as user %s: %w", s.User(), err)
	}
	// It stays open: the process ends with us, however we end.
	if _, err := stdin.Write(in); err != nil {
		return answer{}, fmt.Errorf("act as user %s: %w", s.User(), errors.Join(err, cmd.Wait()))
	}
	stop := context.AfterFunc(ctx, func() { cmd.Process.Signal(syscall.SIGTERM) })
	defer stop()
	err = cmd.Wait()
	var a answer
	if err != nil || json.Unmarshal(out.Bytes(), &a) != nil {
		return answer{}, fmt.Errorf("act as user %s: %w", s.User(), errors.Join(err, context.Cause(ctx)))
	}
	switch {
	case a.Up:
		return a, ErrUp
	case a.Error != "" && ctx.Err() != nil:
		return a, fmt.Errorf("%w: %s", context.Cause(ctx), a.Error)
	case a.Error != "":
		return a, errors.New(a.Error)
	}
	return a, nil
}

// serve is the process that acts for root: it reads a call, becomes the stack's user, and writes the answer.
func serve(in io.Reader, out io.Writer) error {
	var c call
	if err := json.NewDecoder(in).Decode(&c); err != nil {
		return err
	}
	for _, err := range []error{
		syscall.Setgroups(c.Account.Groups),
		syscall.Setgid(c.Account.GID),
		syscall.Setuid(c.Account.UID),
	} {
		if err != nil {
			return fmt.Errorf("become user %s: %w", c.Account.Name, err)
		}
	}
	if os.Getuid() == 0 || os.Geteuid() == 0 {
		return errors.New("still root")
	}
	go func() {
		_, _ = io.Copy(io.Discard, in)
		os.Exit(1) // root's process has ended
	}()
	var log *os.File
	if c.Op == opUp || c.Op == opRestart {
		log = os.NewFile(3, c.Options.Log) // the first descriptor after the standard ones
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	s := &Stack{Dir: c.Dir, bin: c.Bin, account: c.Account}
	a, err := s.do(ctx, c, log, os.Stderr)
	if err != nil {
		a.Up, a.Error = errors.Is(err, ErrUp), err.Error()
	}
	return json.NewEncoder(out).Encode(a)
}
