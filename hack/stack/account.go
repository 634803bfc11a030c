package stack

import (
	"fmt"
	"os"
	"os/user"
	"strconv"
)

// DefaultUser is whose stacks root runs. hack/deps.sh makes it.
const DefaultUser = "berth"

// account is the user that a stack runs as.
type account struct {
	Name     string
	Home     string
	UID, GID int
	Groups   []int // beside GID
}

// stackAccount returns our own account or, when we are root, the one of that name.
func stackAccount(name string) (account, error) {
	if uid := os.Getuid(); uid != 0 {
		home, err := os.UserHomeDir()
		if err != nil {
			return account{}, err
		}
		name := strconv.Itoa(uid)
		if u, err := user.Current(); err == nil {
			name = u.Username
		}
		return account{Name: name, Home: home, UID: uid, GID: os.Getgid()}, nil
	}
	u, err := user.Lookup(name)
	if err != nil {
		return account{}, fmt.Errorf("root's stacks run as the user %s: %w: make it with hack/deps.sh", name, err)
	}
	ids, err := u.GroupIds()
	if err != nil {
		return account{}, err
	}
	a := account{Name: u.Username, Home: u.HomeDir}
	for i, id := range append([]string{u.Uid, u.Gid}, ids...) {
		n, err := strconv.Atoi(id)
		if err != nil {
			return account{}, err
		}
		switch i {
		case 0:
			a.UID = n
		case 1:
			a.GID = n
		default:
			a.Groups = append(a.Groups, n)
		}
	}
	if a.UID == 0 {
		return account{}, fmt.Errorf("root's stacks run as the user %s, who must be another one than root", name)
	}
	return a, nil
}
