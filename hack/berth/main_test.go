//go:build linux

package main

import (
	"bytes"
	"context"
	"strings"
	"testing"

	"gotest.tools/v3/assert"
	is "gotest.tools/v3/assert/cmp"

	"berth/hack/stack"
)

func TestMisuseIsSaidWithAHint(t *testing.T) {
	for _, tt := range []struct {
		args []string
		says string
	}{
		{[]string{"nosuch"}, "there is no command \"nosuch\"\nsee `berth --help`"},
		{[]string{"statu"}, "there is no command \"statu\": is it status?"},
		{[]string{"up", "now"}, "unexpected argument \"now\"\nsee `berth up --help`"},
		{[]string{"down", "--all"}, "unknown flag: --all\nsee `berth down --help`"},
		{[]string{"--nosuch"}, "unknown flag: --nosuch"},
		{[]string{"up", "--stock", "--dockerd", "x"}, "none of the others can be"},
		{[]string{"status", "--name", "A/B"}, "want lower case letters, digits and dashes"},
		{[]string{"stress", "-n", "0"}, "want at least one start"},
		{[]string{"build", "nosuch"}, "no component \"nosuch\": there are dockerd,"},
	} {
		var out, stderr bytes.Buffer
		cmd := newRootCommand()
		cmd.SetArgs(tt.args)
		cmd.SetOut(&out)
		cmd.SetErr(&stderr)
		assert.Check(t, is.Equal(run(context.Background(), cmd, &stderr), misused), "%q", tt.args)
		assert.Check(t, is.Contains(stderr.String(), tt.says))
		assert.Check(t, is.Equal(out.String(), ""))
	}
}

func TestHelpAndVersionAreNoMisuse(t *testing.T) {
	for args, says := range map[string]string{"": "Usage:", "--help": "Exit status:", "help up": "berth up --name", "--version": "+berth."} {
		var out, stderr bytes.Buffer
		cmd := newRootCommand()
		cmd.SetArgs(strings.Fields(args))
		cmd.SetOut(&out)
		cmd.SetErr(&stderr)
		assert.Check(t, is.Equal(run(t.Context(), cmd, &stderr), 0), stderr.String())
		assert.Check(t, is.Contains(out.String(), says))
	}
}

func TestProxies(t *testing.T) {
	got := proxies([]string{"HTTP_PROXY=http://p:1", "https_proxy=http://p:2", "NO_PROXY=", "PATH=/bin", "MY_HTTP_PROXY=x"})
	assert.DeepEqual(t, got, []string{"HTTP_PROXY=http://p:1", "https_proxy=http://p:2", "NO_PROXY="})
}

func TestStressIsOneAtATime(t *testing.T) {
	s := &stack.Stack{} // nobody else's: that of user 0, whose stacks there are none of
	unlock, err := lockStress(s)
	assert.NilError(t, err)
	_, err = lockStress(s)
	assert.ErrorContains(t, err, "another `berth stress` is running as user "+s.User())
	unlock()
	unlock, err = lockStress(s)
	assert.NilError(t, err)
	unlock()
}
