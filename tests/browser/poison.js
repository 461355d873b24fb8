// Runs in the page before its own scripts: every text in every answer of the API ends in a hostile one. Not part of the product.
(() => {
  const poison = POISON;
  const plain = window.fetch.bind(window);
  const spoil = (value) => {
    if (typeof value === 'string') return value + poison;
    if (Array.isArray(value)) return value.map(spoil);
    if (value === null || typeof value !== 'object') return value;
    return Object.fromEntries(Object.entries(value).map(([name, one]) => [name, spoil(one)]));
  };
  window.fetch = async (resource, options) => {
    const path = String(resource);
    if (path.endsWith('/stream')) {
      const status = spoil(await (await plain('/api/v1/high-availability', options)).json());
      status.warnings = [`warning ${poison}`];
      status.membership.requests = [{
        name: poison, address: poison, port: 1, version: poison, fingerprint: poison, clock_ms: 5000, at: 1, until: 2,
      }];
      const event = new TextEncoder().encode(`event: status\ndata: ${JSON.stringify(status)}\n\n`);
      const body = new ReadableStream({
        start(controller) {
          controller.enqueue(event);
          const again = setInterval(() => controller.enqueue(event), 500);
          options.signal?.addEventListener('abort', () => clearInterval(again));
        },
      });
      return new Response(body, { headers: { 'content-type': 'text/event-stream' } });
    }
    const response = await plain(resource, options);
    const kind = response.headers.get('content-type') ?? '';
    if (!kind.startsWith('application/json')) return response;
    const answer = spoil(await response.json());
    // Who is logged in decides which pages there are.
    if (path.endsWith('/authenticate')) answer.role = 'admin';
    return new Response(JSON.stringify(answer), { status: response.status, headers: response.headers });
  };
})();
