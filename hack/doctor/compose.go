package doctor

import (
	"context"
	"fmt"
	"net/netip"
	"slices"

	"github.com/compose-spec/compose-go/v2/cli"
)

// FromCompose has what the services of a compose file want published, as `docker compose up` would ask for it.
func FromCompose(ctx context.Context, file string) (asks []Ask, _ error) {
	o, err := cli.NewProjectOptions([]string{file}, cli.WithOsEnv, cli.WithEnvFiles(), cli.WithDotEnv, cli.WithDefaultProfiles())
	if err != nil {
		return nil, err
	}
	project, err := o.LoadProject(ctx)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", file, err)
	}
	names := project.ServiceNames()
	slices.Sort(names)
	for _, name := range names {
		for _, p := range project.Services[name].Ports {
			published := p.Published
			if published == "" {
				published = "0"
			}
			a, err := ParseAsk(published + "/" + p.Protocol)
			if err != nil {
				return nil, fmt.Errorf("%s: service %s: %w", file, name, err)
			}
			if p.HostIP != "" {
				if a.Addr, err = netip.ParseAddr(p.HostIP); err != nil {
					return nil, fmt.Errorf("%s: service %s: %w", file, name, err)
				}
			}
			a.Service = name
			asks = append(asks, a)
		}
	}
	return asks, nil
}
